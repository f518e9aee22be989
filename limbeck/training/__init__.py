"""Training loop: loss of a step, schedules, checkpoints, metrics."""

"""Many runs around one recipe: arms, seeds, tuning, successive halving. `limbeck.sweep.runner` runs one."""

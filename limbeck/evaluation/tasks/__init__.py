"""Tasks with answers that a program checks: mathematics, code, lm-eval."""

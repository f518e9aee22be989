"""Runs programs that a model wrote, and lets them reach nothing. `host` is the door; read it first."""

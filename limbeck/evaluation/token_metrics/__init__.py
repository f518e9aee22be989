"""Metrics of single tokens: divergences, calibration, likeliest tokens."""

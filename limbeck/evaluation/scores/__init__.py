"""Scores: files, metrics, intervals."""

"""Preference pairs: two answers to a prompt, one of them preferred; where they come from, and what is left out."""

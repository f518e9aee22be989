"""Comparison of runs on one page: which arm is best by which metric, how certain that is, and what it cost.

    folders ──► arms ──► tables ──► uncertainty ──► ranking, frontier, curves ──► page.html, .md, .csv

An arm is what differs between runs but the training seed; its runs are the same recipe with several seeds.
"""

from limbeck.compare.page import write_comparison

__all__ = ["write_comparison"]

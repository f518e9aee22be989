"""A language model as judge of pairs of responses."""

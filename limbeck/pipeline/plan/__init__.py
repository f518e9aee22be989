"""Prediction of a run before it begins: memory per rank, disk, tokens, hours and money; see `limbeck plan`."""

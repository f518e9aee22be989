"""Rules over whole sequences: weights and options of each token that depend on its response."""

"""Responses as training data: offline, replayed or sampled during training; their order, batches and health."""

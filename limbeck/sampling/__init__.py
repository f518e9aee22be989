"""Sampling of responses: from a local model, by speculative decoding, from a server."""

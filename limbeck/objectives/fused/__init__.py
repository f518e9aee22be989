"""The fused loss: objective and gradients in tiles of the logits, which are never held whole."""

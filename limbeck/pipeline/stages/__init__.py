"""The stages of a run, one module each, named as the command is that ends with it."""

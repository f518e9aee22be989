"""The stages of a run, one module each, with the name of the command that ends with it."""

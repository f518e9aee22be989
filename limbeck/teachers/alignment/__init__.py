"""Two tokenisations of one text side by side, by the bytes of their tokens."""

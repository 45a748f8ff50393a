"""Ways to spoil a patch that a network learns to undo: drawn in numpy, applied in torch."""

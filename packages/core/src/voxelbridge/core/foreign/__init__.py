"""Checkpoints of other programs: their layouts in and out, as maps between tensor names."""

"""Encoders, decoders and pyramids as plain modules."""

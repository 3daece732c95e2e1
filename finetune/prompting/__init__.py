"""Boxes and points: read, drawn while training, run through the decoder."""

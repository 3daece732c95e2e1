"""Grids of fine-tunings over data sets, initial weights, methods, shots and seeds."""

"""Studies: a grid of fine-tunings over data sets, starts, methods, shots and seeds, and the table it gives."""

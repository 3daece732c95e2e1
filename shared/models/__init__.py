"""SAM encoders at any size, and weights that load strictly."""

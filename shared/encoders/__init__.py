"""SAM image encoders: architectures, attention and the full SAM model."""

"""Image encoders of SAM, their attention, and the full SAM model."""

"""Safe reading, strict loading, writing and downloading of weights files."""

"""Training loop, step boundary, exact resume and pre-flight."""

"""Code that both stages use. It imports neither stage."""

"""Fine-tuning run, from its preparation to its report."""

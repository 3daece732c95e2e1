"""Stage 2, fine-tuning, evaluation and release."""

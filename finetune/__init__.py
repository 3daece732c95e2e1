"""Stage 2: fine-tune, evaluate and release."""

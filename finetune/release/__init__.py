"""Release of fine-tuned models in every format, with their card."""

"""The fine-tuning run: settings, preparation, steps, rounds of validation, report."""

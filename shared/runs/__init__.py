"""Run folders with configuration, inputs, metrics and training states."""

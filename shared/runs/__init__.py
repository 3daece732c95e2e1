"""Run folders on disk: configuration, inputs, metrics and training states."""

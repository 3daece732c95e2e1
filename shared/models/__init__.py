"""Former import paths that released model cards name."""

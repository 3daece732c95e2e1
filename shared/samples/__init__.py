"""Training samples: patient splits, datasets, samplers, augmentation and framing."""

"""Self-training, from teachers on the labelled scans to a student on labels and pseudo-labels."""

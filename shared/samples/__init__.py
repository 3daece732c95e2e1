"""Training samples, from patient-level splits to batches in the input frame of the encoder."""

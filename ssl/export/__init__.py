"""What a stage-1 run leaves: encoder weights, membership audit and release."""

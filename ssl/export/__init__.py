"""Results of a stage-1 run, which are encoder weights, membership audit and release."""

"""What both stages use: errors, configuration, data, models, training state. Imports neither stage."""

"""What leaves the lab: one folder that every client loads, with its card."""

"""Scores on the scans' own grids with intervals, comparisons and reports."""

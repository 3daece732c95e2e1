"""Scores on the scans' own grid, their intervals, comparisons and the report."""

"""HTML reports in one file."""

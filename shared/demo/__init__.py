"""Demo scans, larger data sets to try, and base weights."""

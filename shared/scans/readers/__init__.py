"""Readers of scan files, one module with one record per format."""

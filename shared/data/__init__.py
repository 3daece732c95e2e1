"""Scans to slice stores to samples."""

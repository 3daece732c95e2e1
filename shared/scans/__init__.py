"""Scan files, from folders on disk to volumes with known geometry."""

"""Scan files on disk: discovery, readers, orientation, intensity and privacy checks."""

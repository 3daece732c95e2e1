"""The napari plugin, which opens scans, segments layers, and saves labels."""

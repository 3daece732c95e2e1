"""Readers: one module per file format, each returning a :class:`~samgraft.shared.scans.volume.Volume`."""

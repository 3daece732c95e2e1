"""Readers: one module per file format, each returning a :class:`~samgraft.shared.data.volume.Volume`."""

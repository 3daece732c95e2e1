"""The slice store: checked volumes written as zarr, and slices read from it."""

"""Slice store, which holds checked volumes as zarr and is read slice by slice."""

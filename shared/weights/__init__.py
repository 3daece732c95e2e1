"""Weights files: safe reading, formats, strict loading, cards and downloads."""

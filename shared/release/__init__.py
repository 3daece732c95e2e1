"""Formats, load-back check, card, licence and privacy gate of a release, for both stages."""

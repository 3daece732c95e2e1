"""Views of a slice for self-supervision: hidden tokens, crops and features per view."""

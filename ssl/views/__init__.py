"""Views of a slice for self-supervision, which are hidden tokens, crops and features per view."""

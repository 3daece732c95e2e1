"""Prompts read from files or drawn from labels, and their decoding."""

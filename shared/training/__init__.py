"""Run folders, exact resume, progress, reports."""

"""Monitoring of a stage-1 run, with held-out loss, linear probe, box-prompt check, warnings and report."""

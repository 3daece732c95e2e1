"""What a stage-1 run measures while it trains: held-out loss, linear probe, box-prompt check, reports."""

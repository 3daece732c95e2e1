"""Commands of stage 2; light imports only."""

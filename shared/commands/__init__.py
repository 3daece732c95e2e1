"""Commands that belong to no stage; light imports only."""

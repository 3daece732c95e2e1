"""Commands of stage 2. Light imports only."""

"""The run directory: writing one, reading, checking and loading it, here or on the hub."""

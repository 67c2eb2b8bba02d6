"""A run written for other tools, loaded again by each and compared: one file a format."""

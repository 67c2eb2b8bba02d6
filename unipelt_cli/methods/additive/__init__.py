"""Methods that add modules to the backbone or beside it."""

"""Reading and writing files safely: atomic, sealed, bounded, locked."""

"""Rows: reading files and tasks, drawing splits by the protocol, the prepared directory."""

"""What a person can ask for: one file a command, named as it is typed."""

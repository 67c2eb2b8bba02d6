"""What a person can ask for: one file a command, `eval` in evaluate, `list` in listing."""

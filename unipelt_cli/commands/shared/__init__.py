"""What several commands need: options, settings, the run argument, training shown live."""

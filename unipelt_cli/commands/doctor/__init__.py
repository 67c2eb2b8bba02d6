"""The command `doctor`: whether unipelt works here, and what to do where it does not."""

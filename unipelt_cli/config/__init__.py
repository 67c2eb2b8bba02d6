"""The Experiment, the one value that describes a run: sections, checks, presets, TOML."""

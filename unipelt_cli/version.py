"""The version of the package: the build reads it here, and every run records it."""

__version__ = "0.1.0"

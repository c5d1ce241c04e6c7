"""The package's version: the one place that tells it."""

__version__ = "0.1.0"

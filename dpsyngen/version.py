"""The one place where the versions are written."""

__version__ = "0.1.0"

FORMAT = 1
"""Of run directories and released generators."""

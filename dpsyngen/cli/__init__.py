"""The command line: parses, calls the library, prints."""

from dpsyngen.cli.app import main

__all__ = ["main"]

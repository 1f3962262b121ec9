"""Comparing variants, ε and settings: grids of runs, their measures and their tables."""

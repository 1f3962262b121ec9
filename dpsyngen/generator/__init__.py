"""A trained generator for the one who gets it: reading a release, drawing from it, its guarantee."""

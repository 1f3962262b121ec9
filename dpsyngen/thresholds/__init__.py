"""Finding the thresholds of the stages: where may programs replace private data?"""

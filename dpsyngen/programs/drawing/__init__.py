"""What image programs are made of: compiled loops, counter-based random numbers, portable functions, rasters.

Everything here gives the same bits on every machine; see `compiled`.
"""

"""The mechanism, on its own: per-example clipped gradients, Gaussian noise, Poisson sampling, accounting, ledger.

Nothing in this package knows of images or of diffusion.  The heavy modules (those that need torch or
dp-accounting) are imported by their own names, so that ``import dpsyngen.privacy`` stays cheap.
"""

"""Audits: does the mechanism do what is claimed of it?  Lower bounds on ε from attacks, and exact invariants.

Each file holds one audit and can be used on its own with any model; ``findings`` is the form in which they report.
"""

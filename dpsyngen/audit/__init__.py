"""Attacks on our own runs: lower bounds on ε beside what is claimed, and exact checks of what was done."""

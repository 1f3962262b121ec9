"""Diffusion models in the notation of EDM (Karras et al. 2022, arXiv 2206.00364); nothing here knows of privacy.

x = x₀ + σ·n with n ~ N(0, I), and D(x; σ, y) ≈ E[x₀ | x, y].  σ is the one notion of time everywhere.
"""

"""Per-example gradients of models whose parameters lie on several devices."""

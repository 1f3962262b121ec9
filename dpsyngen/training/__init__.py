"""Training: public (programmatic images), private (DP-SGD), checkpoints and the run directory that holds them."""

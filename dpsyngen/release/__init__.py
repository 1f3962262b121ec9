"""What is published of a run: weights, certificate, card, bundle, and checking a bundle."""

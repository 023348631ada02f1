"""Leaving out weights, neurons, heads or whole blocks, by score, by training or by construction."""

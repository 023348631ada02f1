"""Acting: offline and in-context reinforcement learning and Bayesian optimization."""

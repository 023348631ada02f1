"""Small trainable parts for a frozen model: adapters, prompts, low-rank experts and side networks."""

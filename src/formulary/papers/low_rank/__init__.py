"""Dense weights written as products of thinner ones, before training or after it."""

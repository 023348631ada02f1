"""Fast CPU paths, each with a plain twin in PyTorch that runs where the fast one is missing."""

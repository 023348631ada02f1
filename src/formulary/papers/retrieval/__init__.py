"""Embeddings for search and matching: long documents, stable indexes and training data for relevance."""

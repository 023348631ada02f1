"""Fewer tokens through a vision Transformer: dropped, merged, propagated or sampled."""

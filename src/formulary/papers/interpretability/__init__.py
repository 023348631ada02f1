"""Reading what a model computes: features, heads, attributions and behavioral probes."""

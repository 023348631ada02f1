"""The per-token half of a block: mixtures of experts, emergent and random routing, weights per modality, and
conditional width."""

"""What lets tokens exchange information: sparse, local and linear attention, state space models, long convolutions,
pooling and spectral mixers. Most take (B, L, D) in and out and differ in cost, state and causality."""

from .method import GTP, PatchGrid, Propagation, ScoredAttention

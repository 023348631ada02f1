from .method import PatchGrid, Pruning, RankedAttention, ZeroTPrune

from .method import AxFormer, FewerHeads, HardAttention, Removed, SlicedLinear

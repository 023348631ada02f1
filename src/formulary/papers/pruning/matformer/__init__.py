from .method import MatFormer, SlicedLinear

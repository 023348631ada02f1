from .method import LowRankLinear, LowRankTransformer

from .method import BiPFT, BiPFTEmbedding, BiPFTLinear, ResidualAttention, ResidualMaps

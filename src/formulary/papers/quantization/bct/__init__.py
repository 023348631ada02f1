from .method import BCT, BlockActivation, BlockAttention, BlockEmbedding, BlockLinear, BlockNorm

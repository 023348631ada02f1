from .method import TBT, ElasticAttention, TBTEmbedding, TBTLinear

from .method import GatedLinearAttention

from .method import LeanAttention

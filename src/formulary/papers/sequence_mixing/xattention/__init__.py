from .method import XAttention

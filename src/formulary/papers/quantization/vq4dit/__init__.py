from .method import VQ4DiT, VQLinear

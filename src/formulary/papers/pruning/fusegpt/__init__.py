from .method import FuseGPT

from .method import SAM

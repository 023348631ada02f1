from .method import TransKD

from .method import DiscreteMamba2, Mohawk

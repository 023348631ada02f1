from .method import MiniLM

from .method import SelfDistillation

from .method import EcoM2F, ExitBlock

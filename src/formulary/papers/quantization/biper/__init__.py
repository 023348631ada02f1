from .method import BiPer, BiPerLinear

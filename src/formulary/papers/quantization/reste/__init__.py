from .method import ReSTE, ReSTELinear

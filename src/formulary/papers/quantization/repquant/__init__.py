from .method import QuantizedAttention, QuantizedLinear, RepQuant

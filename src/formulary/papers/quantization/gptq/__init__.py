from .method import GPTQ, PackedExperts, PackedLinear, compensated

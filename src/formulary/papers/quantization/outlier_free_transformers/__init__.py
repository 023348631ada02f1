from .method import ClippedSoftmax, GatedAttention

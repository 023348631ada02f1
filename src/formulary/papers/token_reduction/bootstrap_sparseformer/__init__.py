from .method import BootstrapSparseFormer, FocusedEmbeddings, LatentBlock, Truncated

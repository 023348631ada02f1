from .method import IntelSparseSpmmCpu, SparseInt8Linear, sparse_int8_linear

from .method import CCT, ConvTokenizer, SequencePool

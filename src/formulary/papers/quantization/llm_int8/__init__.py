from .method import Int8Embedding, Int8Linear, LLMInt8, int8_linear

from .method import Int8Linear, LLMInt8, SharedInput, int8_linear

from .method import SparkAttention, SparkFFN, StatTopK

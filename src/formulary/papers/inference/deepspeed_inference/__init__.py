from .method import DeepSpeedInference, FusedAttention, Streamed, Unpadded

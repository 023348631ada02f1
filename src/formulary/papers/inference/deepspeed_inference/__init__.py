from .method import DeepSpeedInference, FusedAttention, FusedBlock, Streamed, Unpadded

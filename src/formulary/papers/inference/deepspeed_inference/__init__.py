from .method import DeepSpeedInference, FusedAttention, FusedBlock, FusedStack, Streamed, Unpadded

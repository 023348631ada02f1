from .method import DeepSpeedInference, FusedAttention, FusedBlock, FusedEmbeddings, FusedStack, Streamed, Unpadded

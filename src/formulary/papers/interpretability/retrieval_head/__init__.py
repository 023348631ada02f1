from .method import Needle, RetrievalHeads, copied_positions, masked_heads, retrieval_scores

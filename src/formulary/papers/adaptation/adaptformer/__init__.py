from .method import AdaptFormer, NormalizedHead, ParallelBranch

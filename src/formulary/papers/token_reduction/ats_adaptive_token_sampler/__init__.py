from .method import AdaptiveTokenSampler, PatchGrid, SampledAttention, Sampling

from .method import EssentialSparsity, fixed, group_masks, magnitude_masks, mask_cosine, share_below

from .method import OPTIN, FewerHeads, Removed, SlicedLinear, least_squares, split_budget

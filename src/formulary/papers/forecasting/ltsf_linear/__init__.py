from .method import LTSFLinear, decompose, windows

from .method import Removed, SlicedLinear, TurboVBI

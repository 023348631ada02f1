from .method import ASDM, Dropped, ExpertConv2d, ExpertLinear

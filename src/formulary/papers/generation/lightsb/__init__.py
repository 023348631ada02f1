from .method import LightSB

from .method import OneStepGD

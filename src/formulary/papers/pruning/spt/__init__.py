from .method import SPT, PQAttention, RoutedFeedForward

from .method import FiRST, RoutedBlock

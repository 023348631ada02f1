from .method import ClippedAttention, TeacherIntervention, TernaryEmbedding, TernaryLinear

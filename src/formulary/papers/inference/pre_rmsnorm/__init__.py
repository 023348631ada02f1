from .method import CenteredInput, CRMSNorm, PreRMSNorm, RMSNorm

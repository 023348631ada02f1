"""How weights are trained: learning rates, augmentation, data formats, sharpness, norms, memory and parallelism."""

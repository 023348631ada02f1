"""How raw input becomes tokens: patches, positions, bytes, codebooks and spectrogram slices."""

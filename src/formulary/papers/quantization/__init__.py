"""Fewer bits per weight and activation, after training or during it: calibration, error compensation, outliers,
vector codebooks and surrogate gradients."""

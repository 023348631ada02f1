"""The same or nearly the same outputs for less work at run time: exact rewrites, early exits, layer skipping,
kernels and weight streaming."""

"""Predicting numbers from tables and time series, always beside a simple baseline."""

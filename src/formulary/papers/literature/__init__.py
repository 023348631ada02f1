"""Surveys, data sets, benchmarks and reports: cards alone, nothing to run."""

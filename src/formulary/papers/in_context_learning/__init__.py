"""What a model learns from its prompt alone: constructions, optimal predictors to compare with, and ways to measure
and steer it."""

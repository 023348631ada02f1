"""Objectives and data for training before the task is known, mostly without labels."""

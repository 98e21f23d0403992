"""Measuring packed models: comparison, generation, speed, read-back, lm-eval."""

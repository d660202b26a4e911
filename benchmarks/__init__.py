"""Measurements and comparisons that people run; nothing in the library or the pipeline needs them."""

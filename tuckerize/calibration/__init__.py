"""Calibration: what a model's experts see and give on a text, and decompositions that use it."""

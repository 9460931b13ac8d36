"""Pure tensor mathematics of the Tucker decomposition: independent of files, processes and models.

Suffixes of tensor names give shapes: E experts, H intermediate, I hidden; P, Q, R the core sizes
r_E, r_H, r_I of these modes.
"""

"""Pure tensor mathematics of the Tucker decomposition: no files, no processes, no model names.

Letters at the end of tensor names give shapes: E experts, H intermediate, I hidden; P, Q, R the
core sizes r_E, r_H, r_I of these modes.
"""

"""Makes Mixture-of-Experts checkpoints smaller by HOOI Tucker decomposition."""

__version__ = "0.1.0"

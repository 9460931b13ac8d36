"""The commands, one module each, and the steps that carry a plan out."""

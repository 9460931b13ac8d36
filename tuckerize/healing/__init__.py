"""Recovery training: what is trained, the loop, and its state."""

"""What runs a compressed layer."""

"""Modules that run a compressed layer."""

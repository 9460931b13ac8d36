"""Devices, processes, and which slice of a tensor each process owns."""

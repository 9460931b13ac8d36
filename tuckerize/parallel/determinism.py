"""Runs that repeat bit for bit."""

from __future__ import annotations

import os

import torch

# Read by HCCL when a communicator is made, and by cuBLAS when a device is first used.
_SETTINGS = {"HCCL_DETERMINISTIC": "true", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def make_deterministic() -> None:
    """Have torch, HCCL and cuBLAS add in a fixed order; before a device or process group starts.

    Settings of the environment that the user has made are kept.

    Raises:
        RuntimeError: Later, from an operator that has no such form on the device.

    Source:
        torch.use_deterministic_algorithms; CANN, environment variables of HCCL.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)  # noqa: FBT003

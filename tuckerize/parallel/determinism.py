"""Bitwise reproducible runs."""

from __future__ import annotations

import os

import torch

from tuckerize.ascend.environment import make_hccl_deterministic


def make_deterministic() -> None:
    """Make torch, HCCL and cuBLAS reduce in a fixed order.

    To be called before a device is used or a process group is made. Environment variables that are
    set already are kept.

    Raises:
        RuntimeError: Later, from an operator without a deterministic form on the device.

    Source:
        torch.use_deterministic_algorithms.
    """
    make_hccl_deterministic()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it on first use
    torch.use_deterministic_algorithms(True)  # noqa: FBT003

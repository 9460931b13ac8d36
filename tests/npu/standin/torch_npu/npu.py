"""`torch.npu` of the stand-in: what torch, transformers and tuckerize ask of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

device: Any = None
matmul = SimpleNamespace(allow_hf32=False)


def is_available() -> bool:
    """Whether there is a device."""
    return device_count() > 0


def is_initialized() -> bool:
    """Always: there is nothing to initialise."""
    return True


def device_count() -> int:
    """Number of devices: $NPU_STANDIN_DEVICES, 8 by default."""
    count: int = device.device_count()
    return count


def current_device() -> int:
    """Index of the current device."""
    index: int = device.current_device()
    return index


def set_device(index: int) -> None:
    """Make a device current."""
    device.set_device(index)


def get_device_name(index: int | None = None) -> str:
    """Name of a device, one that real ones have."""
    return "Ascend910B3"


def mem_get_info(index: int | None = None) -> tuple[int, int]:
    """Free and total bytes."""
    return 60 * 2**30, 64 * 2**30


def manual_seed_all(seed: int) -> None:
    """Do nothing: random numbers come from the CPU's generator."""


def _is_in_bad_fork() -> bool:
    return False


def get_rng_state(index: int | None = None) -> torch.Tensor:
    """The CPU's."""
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, index: int | None = None) -> None:
    """Set the CPU's."""
    torch.set_rng_state(state)


def get_amp_supported_dtype() -> list[torch.dtype]:
    """Types of autocast."""
    return [torch.float16, torch.bfloat16]

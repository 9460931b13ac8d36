"""Device and collective backend: one code path for npu, cuda and cpu."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from tuckerize.ascend.npu import import_torch_npu
from tuckerize.errors import ParallelError

DeviceChoice = Literal["auto", "npu", "cuda", "cpu"]

# torch before 2.8 has no table of default backends.
_BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}

# Names of the Atlas training series, which the A2 series' (Ascend910B1 and on) only resemble.
_FIRST_NPUS = frozenset(f"Ascend910{kind}" for kind in ("A", "B", "ProA", "ProB", "PremiumA"))


def choose_device(choice: DeviceChoice, *, local_rank: int = 0) -> torch.device:
    """The device to work on, made current.

    Args:
        choice: `auto` takes the accelerator where there is one.
        local_rank: Index of the process on its host, and so of its device.

    Raises:
        ParallelError: The device is not there, or has fewer units than processes on this host.
    """
    if choice == "npu":
        import_torch_npu()
    found = torch.accelerator.current_accelerator(check_available=True)
    available = "cpu" if found is None else found.type
    kind = available if choice == "auto" else choice
    if kind == "cpu":
        return torch.device("cpu")
    if kind != available:
        raise ParallelError(
            f"device '{kind}' is not available: torch {torch.__version__} finds {available} only",
            hint=f"use --device {available}, or install the torch build and driver for {kind}",
        )
    if local_rank >= torch.accelerator.device_count():
        raise ParallelError(
            f"process {local_rank} of this host has no {kind} device: there are "
            f"{torch.accelerator.device_count()}",
            hint="start as many processes as devices (--nproc-per-node)",
        )
    torch.accelerator.set_device_index(local_rank)
    return torch.device(kind, local_rank)


def backend_for(device: torch.device) -> str:
    """The device's own collective backend, beside gloo for the host: `cpu:gloo,npu:hccl`."""
    lookup = getattr(dist, "get_default_backend_for_device", None)
    name = _BACKENDS[device.type] if lookup is None else str(lookup(device.type))
    return name if device.type == "cpu" else f"cpu:gloo,{device.type}:{name}"


def let_hccl_wait(timeout: timedelta) -> None:
    """Set how long HCCL waits on the devices, which torch's own time-out does not change.

    Before the first communicator, and only where the environment does not say it already.

    Source:
        CANN 8.5: HCCL_CONNECT_TIMEOUT is 120 to 7200 s, HCCL_EXEC_TIMEOUT 1836 s by default.
    """
    seconds = int(timeout.total_seconds())
    os.environ.setdefault("HCCL_CONNECT_TIMEOUT", str(min(max(seconds, 120), 7200)))
    os.environ.setdefault("HCCL_EXEC_TIMEOUT", str(seconds))


def float32_products(device: torch.device) -> str:
    """In what a device multiplies float32 matrices: float32, tf32, hf32 or float16.

    Source:
        torch_npu's `allow_hf32`; CANN on the Atlas training series (Ascend 910A).
    """
    if device.type == "cuda":
        return "float32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    if device.type == "npu":
        npu = torch.get_device_module(device)
        if npu.get_device_name(device.index) in _FIRST_NPUS:
            return "float16"
        return "hf32" if npu.matmul.allow_hf32 else "float32"
    return "float32"


def npu_product(name: str) -> str:
    """The series of an NPU by the name of its device, where it matters: A2, A3, or that name.

    Source:
        torch_npu's names: Ascend910B1 and on are of A2, Ascend910_9362 and on of A3.

    >>> npu_product("Ascend910B4-1"), npu_product("Ascend910_9392"), npu_product("Ascend910B")
    ('A2', 'A3', 'Ascend910B')
    """
    if re.match(r"Ascend910B\d", name):
        return "A2"
    return "A3" if name.startswith("Ascend910_93") else name


def free_memory(device: torch.device) -> tuple[int, int]:
    """Free and total bytes of a device, or of the host."""
    if device.type != "cpu":
        free, total = torch.get_device_module(device).mem_get_info(device.index)
        return int(free), int(total)
    page = os.sysconf("SC_PAGE_SIZE")
    return page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")

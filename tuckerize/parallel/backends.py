"""Device and collective backend: one code path for NPU, CUDA and CPU."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from tuckerize.ascend import environment
from tuckerize.ascend.npu import import_torch_npu
from tuckerize.domain import Cores, CoreType, Device
from tuckerize.errors import ParallelError

# torch before 2.8 has no table of default backends.
_BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}


def choose_device(choice: Device, *, local_rank: int = 0) -> torch.device:
    """Choose the device to work on and make it current.

    Args:
        choice: `auto` takes an accelerator if there is one.
        local_rank: Index of the process on its host, which is the index of its device.

    Raises:
        ParallelError: The device is not available, or the host has fewer devices than processes.
    """
    if choice == Device.NPU:
        import_torch_npu()
    found = torch.accelerator.current_accelerator(check_available=True)
    available = "cpu" if found is None else found.type
    kind = available if choice == Device.AUTO else choice
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
            hint="start no more processes per host than devices (--nproc-per-node)",
        )
    torch.accelerator.set_device_index(local_rank)
    return torch.device(kind, local_rank)


def check_encoding(device: torch.device, cores: Cores) -> None:
    """Refuse cores in an encoding that a device has no type for.

    Raises:
        ParallelError: They are in fp8, and the device is an NPU.
    """
    kinds = {*cores.values()} if isinstance(cores, dict) else {cores}
    if device.type == "npu" and CoreType.FP8 in kinds:
        raise ParallelError(
            "cores in fp8 cannot be computed on an Ascend NPU: A2 and A3 have no float8",
            hint="use --device cpu, or quantise the cores with w8",
        )


def backend_for(device: torch.device) -> str:
    """The device's default collective backend, and gloo for the host: `cpu:gloo,npu:hccl`."""
    lookup = getattr(dist, "get_default_backend_for_device", None)
    name = _BACKENDS[device.type] if lookup is None else str(lookup(device.type))
    return name if device.type == "cpu" else f"cpu:gloo,{device.type}:{name}"


def float32_products(device: torch.device) -> str:
    """Type in which a device multiplies float32 matrices: float32, tf32, hf32 or float16."""
    if device.type == "cuda":
        return "float32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    if device.type == "npu":
        return environment.float32_products(torch.get_device_module(device), device.index)
    return "float32"


def free_memory(device: torch.device) -> tuple[int, int]:
    """Free and total bytes of a device, or of the host."""
    if device.type != "cpu":
        free, total = torch.get_device_module(device).mem_get_info(device.index)
        return int(free), int(total)
    page = os.sysconf("SC_PAGE_SIZE")
    return page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")

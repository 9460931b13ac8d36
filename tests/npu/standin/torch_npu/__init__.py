"""A stand-in for torch_npu on a machine without an NPU, see device.cpp.

Importing it makes torch know the device `npu` and the backend `hccl`, as importing the real one
does. `region` marks the code that must not wait for the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroupGloo, Store
from torch.utils.backend_registration import (
    generate_methods_for_privateuse1_backend,
    rename_privateuse1_backend,
)

from . import npu
from .building import load_device
from .fused import COMMUNICATORS, npu_moe_distribute_combine_v2, npu_moe_distribute_dispatch_v2
from .grouped import npu_grouped_matmul

__all__ = [
    "calls",
    "npu_fusion_attention",
    "npu_grouped_matmul",
    "npu_moe_distribute_combine_v2",
    "npu_moe_distribute_dispatch_v2",
    "region",
]

__version__ = torch.__version__.partition("+")[0]

_device = load_device()


def _create_hccl(store: Store, rank: int, size: int, timeout: Any) -> Any:  # noqa: ANN401
    gloo = ProcessGroupGloo(store, rank, size, timeout)
    name = f"standin-{len(COMMUNICATORS)}"
    COMMUNICATORS[name] = gloo
    return _device.Hccl(gloo, name)


def _install() -> None:
    rename_privateuse1_backend("npu")
    npu.device = _device
    torch._register_device_module("npu", npu)  # type: ignore[no-untyped-call]
    generate_methods_for_privateuse1_backend(for_storage=True)
    dist.Backend.register_backend("hccl", _create_hccl, devices=["npu"])


def _autoload() -> None:
    """What torch calls when it is imported."""


@contextmanager
def region() -> Iterator[dict[str, int]]:
    """Code that must not wait for the host; yields what waited, by name, filled at the end."""
    found: dict[str, int] = {}
    _device.forget()
    _device.mark(True)
    try:
        yield found
    finally:
        _device.mark(False)
        found.update(_device.synchronisations())


def calls() -> dict[str, int]:
    """How often each operator has run on the device since the last `region`."""
    found: dict[str, int] = _device.calls()
    return found


def npu_fusion_attention(*_: object, **__: object) -> None:
    """Only imported, by transformers."""
    raise NotImplementedError


_install()

"""What the stand-in NPU refuses and counts: its own test, printed as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
import torch_npu
from torch import Tensor

x = torch.eye(4, device="npu")
mask = x > 0


def message(work: Callable[[], object]) -> str:
    """What it is refused with; empty if it is not."""
    try:
        work()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return ""


def marked(work: Callable[[], object]) -> str:
    with torch_npu.region():
        return message(work)


def waits(work: Callable[[], object]) -> dict[str, int]:
    """What waits for the host in a piece of work."""
    with torch_npu.region() as found:
        work()
    counted: dict[str, int] = found
    return counted


def set_by_mask(value: Tensor) -> None:
    value[mask] = 1.0


if __name__ == "__main__":
    found = {
        "float64 tensor": message(lambda: torch.zeros(2, dtype=torch.float64, device="npu")),
        "float64 moved": message(lambda: torch.eye(2, dtype=torch.float64).to("npu")),
        "inv": message(lambda: torch.linalg.inv(x)),
        "eigh": message(lambda: torch.linalg.eigh(x)),
        "grouped": message(lambda: torch._grouped_mm(x, x[None])),
        "nonzero": marked(x.nonzero),
        "mask": marked(lambda: x[mask]),
        "set by mask": marked(lambda: set_by_mask(x.clone())),
        "nonzero outside": message(x.nonzero),
        "double": str(x.double().dtype),
        "waits for an item": waits(lambda: float(x.sum())),
        "waits for a copy": waits(lambda: x.exp().cpu()),
        "waits for nothing": waits(lambda: x.exp() @ x),
    }
    sys.stdout.write(json.dumps(found))

"""The forward of a layer on the stand-in NPU, as JSON by case.

What waits for the host in it, and how far its output and its gradients are from those of float64 on
the CPU.
"""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import torch
import torch_npu
from torch import Tensor

from tuckerize.domain import Mode, Projection
from tuckerize.moe.family import Glu
from tuckerize.names import TensorName
from tuckerize.runtime.activations import activation_of
from tuckerize.runtime.experts import TuckerExperts

EXPERTS, INTERMEDIATE, HIDDEN, TOKENS, TOP_K = 6, 16, 20, 9, 2

WIDTHS = (16, 1, 8, 16, 12, 5)

# r_E, r_H, r_I of every stack; None for r_H where experts have the widths above.
CASES = {
    "all modes": (3, 8, 12),
    "hidden mode": (EXPERTS, INTERMEDIATE, 12),
    "unequal widths": (EXPERTS, None, 12),
}


def layer(rank: tuple[int, int | None, int]) -> TuckerExperts:
    """A random layer."""
    generator = torch.Generator().manual_seed(0)
    sizes = dict(zip(Mode, (EXPERTS, INTERMEDIATE, HIDDEN), strict=True))
    tensors = {}
    mixed, neurons, hidden = rank
    for projection in Projection:
        if neurons is None:
            for expert, width in enumerate(WIDTHS):
                matrix = torch.randn((width, hidden), generator=generator)
                tensors[TensorName.core(projection, expert)] = matrix
        else:
            core = torch.randn((mixed, neurons, hidden), generator=generator)
            tensors[TensorName.core(projection)] = core
        for (mode, size), columns in zip(sizes.items(), rank, strict=True):
            if columns is not None and columns < size:
                factor = torch.randn((size, columns), generator=generator)
                tensors[TensorName.factor(mode, projection)] = factor
    return TuckerExperts([tensors], group_size=EXPERTS, activation=activation_of(Glu()))


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their experts and weights."""
    generator = torch.Generator().manual_seed(1)
    x_TI = torch.randn(TOKENS, HIDDEN, generator=generator)
    weights_Tk, experts_Tk = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOP_K, dim=1)
    return x_TI, experts_Tk, weights_Tk


def gradients(experts: TuckerExperts, routed: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Those of all parameters, on the CPU."""
    experts.requires_grad_()
    experts(*routed).square().sum().backward()
    return [
        torch.zeros_like(value).cpu() if value.grad is None else value.grad.cpu()
        for value in experts.parameters()
    ]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative difference."""
    pairs = zip(found, exact, strict=True)
    return max(float((one.double() - two).norm() / two.norm().clamp_min(1)) for one, two in pairs)


def measured(rank: tuple[int, int | None, int]) -> dict[str, Any]:
    """One case; the forward that is watched is the second."""
    x_TI, experts_Tk, weights_Tk = tokens()
    whole = layer(rank)
    exact = copy.deepcopy(whole).double()
    routed = (x_TI.double(), experts_Tk, weights_Tk.double())
    on_npu = copy.deepcopy(whole).to("npu")
    on_device = (x_TI.to("npu"), experts_Tk.to("npu"), weights_Tk.to("npu"))
    on_npu(*on_device)
    with torch_npu.region() as found:
        output = on_npu(*on_device)
    return {
        "waits": found,
        "output": error([output.cpu()], [exact(*routed)]),
        "gradients": error(gradients(on_npu, on_device), gradients(exact, routed)),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps({name: measured(rank) for name, rank in CASES.items()}))

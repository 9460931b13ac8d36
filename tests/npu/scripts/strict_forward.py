"""The forward of a layer on the stand-in NPU: what waits for the host in it, as JSON by case."""

from __future__ import annotations

import json
import sys

import torch
import torch_npu

from tuckerize.domain import Projection
from tuckerize.runtime.experts import ACTIVATIONS, TuckerExperts

EXPERTS, INTERMEDIATE, HIDDEN, TOKENS, TOP_K = 6, 16, 20, 9, 2

# r_E, r_H, r_I of every stack.
CASES = {"all modes": (3, 8, 12), "hidden mode": (EXPERTS, INTERMEDIATE, 12)}


def layer(rank: tuple[int, int, int]) -> TuckerExperts:
    """A random layer on the device."""
    generator = torch.Generator().manual_seed(0)
    sizes = dict(zip(("U_E", "U_H", "U_I"), (EXPERTS, INTERMEDIATE, HIDDEN), strict=True))
    tensors = {}
    for projection in Projection:
        tensors[f"{projection}.core"] = torch.randn(rank, generator=generator)
        for (name, size), columns in zip(sizes.items(), rank, strict=True):
            if columns < size:
                factor = torch.randn((size, columns), generator=generator)
                tensors[f"{projection}.{name}"] = factor
    experts = TuckerExperts([tensors], group_size=EXPERTS, activation=ACTIVATIONS["silu"])
    return experts.to("npu")


def synchronisations(rank: tuple[int, int, int]) -> dict[str, int]:
    """What waits for the host in one forward, the first having run already."""
    experts = layer(rank)
    generator = torch.Generator().manual_seed(1)
    x_TI = torch.randn(TOKENS, HIDDEN, generator=generator).to("npu")
    scores_TE = torch.rand(TOKENS, EXPERTS, generator=generator).to("npu")
    weights_Tk, experts_Tk = scores_TE.topk(TOP_K, dim=1)
    experts(x_TI, experts_Tk, weights_Tk)
    with torch_npu.region() as found:
        experts(x_TI, experts_Tk, weights_Tk)
    counted: dict[str, int] = found
    return counted


if __name__ == "__main__":
    sys.stdout.write(json.dumps({name: synchronisations(rank) for name, rank in CASES.items()}))

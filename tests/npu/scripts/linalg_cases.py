"""On the device against the CPU: every decomposition and solution, as JSON of differences by name.

Run with the stand-in NPU, which refuses float64 and what has no kernel.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from tests.cases import Kind, make_stack
from tests.eliminating import eliminate
from tuckerize.domain import MultilinearRank, StackShape
from tuckerize.linalg.hooi import hooi
from tuckerize.linalg.rank_choice import rank_for_tolerance
from tuckerize.linalg.selection import all_neurons, refit_down
from tuckerize.linalg.tucker import TuckerFactors, expand, relative_residual
from tuckerize.linalg.weighted import weighted_tucker

SHAPE = StackShape(6, 10, 14)
RANK = MultilinearRank(3, 5, 7)


def moments(size: int) -> Tensor:
    """A positive definite matrix for every expert."""
    rows = torch.randn((SHAPE.experts, 3 * size, size), generator=torch.Generator().manual_seed(1))
    return rows.mT @ rows


def of_weights(stack: Tensor, tucker: TuckerFactors) -> list[float]:
    """What is compared of a decomposition: its residual, and its expansion's first numbers."""
    numbers: list[float] = expand(tucker).flatten()[:50].cpu().tolist()
    return [relative_residual(stack, tucker), *numbers]


def decomposed(stack: Tensor) -> list[float]:
    return of_weights(stack, hooi([stack], RANK).tensors[0])


def weighted(stack: Tensor, rank: MultilinearRank) -> list[float]:
    found = weighted_tucker([stack], moments(SHAPE.hidden).to(stack.device), rank)
    return of_weights(stack, found.tensors[0])


def eliminated(stack: Tensor) -> list[float]:
    found = eliminate(moments(SHAPE.intermediate).to(stack.device), stack)
    return [*found.order_EH.flatten().tolist(), *found.costs_EH.flatten().tolist()]


def refitted(stack: Tensor) -> list[float]:
    moment = moments(SHAPE.intermediate).to(stack.device)
    pairs = zip(moment, moment, strict=True)
    numbers: list[float] = refit_down(pairs, stack, all_neurons(SHAPE)).flatten().tolist()
    return numbers


noisy = make_stack(Kind.PLANTED, SHAPE, RANK)
# Nearly exact ones are worked on in float64.
nearly_exact = make_stack(Kind.TAIL, SHAPE, RANK)

CASES: dict[str, tuple[Callable[[Tensor], list[float]], Tensor]] = {
    "hooi in float32": (decomposed, noisy),
    "hooi in float64": (decomposed, nearly_exact),
    "hooi of bfloat16": (decomposed, noisy.bfloat16()),
    "rank for a tolerance": (lambda s: list(rank_for_tolerance([s], 0.4)), noisy),
    "rank for a small tolerance": (lambda s: list(rank_for_tolerance([s], 1e-3)), nearly_exact),
    "weighted, all modes": (lambda s: weighted(s, RANK), noisy),
    "weighted, hidden mode": (lambda s: weighted(s, MultilinearRank(6, 10, 7)), noisy),
    "weighted, nearly exact": (lambda s: weighted(s, RANK), nearly_exact),
    "elimination": (eliminated, noisy),
    "refit of down": (refitted, noisy),
}


def difference(work: Callable[[Tensor], list[float]], stack: Tensor) -> float:
    """Largest relative difference of what the device and the CPU find."""
    expected, found = (
        torch.tensor(work(stack.to(place)), dtype=torch.float64) for place in ("cpu", "npu")
    )
    return float((expected - found).norm() / expected.norm())


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps({name: difference(*case) for name, case in CASES.items()}))

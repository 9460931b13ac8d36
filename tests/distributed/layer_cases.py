"""Under torchrun: sharded layers against dense experts in float64, for a table of cases.

Every process cuts its own slices from the same seeded factors, runs the layer, and compares its
output with the dense experts that the factors stand for. Prints the errors as JSON on process 0.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from tuckerize.domain import CORE, Mode, MultilinearRank, Projection, StackShape
from tuckerize.linalg.tucker import TuckerFactors
from tuckerize.parallel.layouts import Layout, part, split_dimension
from tuckerize.runtime.dense import ExpertWeights, dense_output
from tuckerize.runtime.exchange import exchange_for
from tuckerize.runtime.experts import ACTIVATIONS, SHARED_U_I, TuckerExperts

EXPERTS, TOP_K = 6, 2


@dataclass(frozen=True)
class Case:
    """One sharded layer."""

    layout: Layout
    rank: MultilinearRank
    shape: StackShape
    joint: bool
    tokens: int

    @property
    def groups(self) -> int:
        """Groups of experts."""
        return EXPERTS // self.shape.experts


def cases() -> list[Case]:
    """Every layout with every combination of truncated modes, even and uneven sizes."""
    found = []
    for layout, group_size, joint in itertools.product(Layout, (6, 3), (False, True)):
        for sizes in ((16, 20), (17, 23)):
            shape = StackShape(group_size, *sizes)
            for keep in itertools.product((True, False), repeat=3):
                short = (group_size - 1, sizes[0] - 5, sizes[1] - 6)
                chosen = (n if full else r for n, r, full in zip(shape, short, keep, strict=True))
                rank = MultilinearRank(*chosen)
                found.append(Case(layout, rank, shape, joint, tokens=9))
    found.append(Case(Layout.RANK, MultilinearRank(6, 11, 14), StackShape(6, 16, 20), True, 1))
    found.append(
        Case(Layout.INTERMEDIATE, MultilinearRank(6, 16, 14), StackShape(6, 16, 20), True, 0)
    )
    return found


def make_group(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """Random tensors of one group, by their names below it."""
    tensors = {}
    for projection in Projection:
        tensors[f"{projection}.{CORE}"] = torch.randn(tuple(case.rank), generator=generator)
        for mode in case.rank.truncated_modes(case.shape):
            owner: str = projection
            if mode == Mode.HIDDEN and case.joint and projection != Projection.DOWN:
                owner = SHARED_U_I
            size = (case.shape[mode], case.rank[mode])
            tensors[f"{owner}.{mode.factor_name}"] = torch.randn(size, generator=generator) / 4
    return tensors


def factors(case: Case, group: dict[str, Tensor], projection: Projection) -> TuckerFactors:
    """The Tucker tensor of one projection."""
    shared = case.joint and projection != Projection.DOWN
    owner = SHARED_U_I if shared else projection
    return TuckerFactors(
        group[f"{projection}.core"],
        group.get(f"{projection}.U_E"),
        group.get(f"{projection}.U_H"),
        group.get(f"{owner}.U_I"),
    )


def own_slices(
    case: Case, group: dict[str, Tensor], tp_size: int, tp_rank: int
) -> dict[str, Tensor]:
    """One process's slices of a group."""
    slices = {}
    for name, tensor in group.items():
        owner, _, kind = name.partition(".")
        projection = Projection.GATE if owner == SHARED_U_I else Projection(owner)
        dimension = split_dimension(case.layout, projection, kind, case.rank, case.shape)
        if dimension is not None:
            tensor = tensor.narrow(dimension, *part(tensor.shape[dimension], tp_size, tp_rank))  # noqa: PLW2901
        slices[name] = tensor
    return slices


def error_of(case: Case) -> float:
    """Relative error of this process's output."""
    generator = torch.Generator().manual_seed(0)
    groups = [make_group(case, generator) for _ in range(case.groups)]
    x_TI = torch.randn(case.tokens, case.shape.hidden, generator=generator)
    scores = torch.rand(case.tokens, EXPERTS, generator=generator)
    weights_Tk, experts_Tk = scores.topk(TOP_K, dim=1)
    tp_size, tp_rank = dist.get_world_size(), dist.get_rank()
    layer = TuckerExperts(
        [own_slices(case, group, tp_size, tp_rank) for group in groups],
        group_size=case.shape.experts,
        activation=ACTIVATIONS["silu"],
        exchange=exchange_for(case.layout, tp_size=tp_size, tp_rank=tp_rank),
    )
    output_TI = layer(x_TI, experts_Tk, weights_Tk)

    def expert_weights(expert: int) -> ExpertWeights:
        group, place = divmod(expert, case.shape.experts)
        gate, up, down = (
            factors(case, groups[group], projection).expand_slice(place, torch.float64)
            for projection in Projection
        )
        return ExpertWeights(gate, up, down.T)

    expected_TI = dense_output(
        x_TI.double(),
        experts_Tk,
        weights_Tk,
        expert_weights=expert_weights,
        activation=ACTIVATIONS["silu"],
    )
    assert output_TI.shape == expected_TI.shape
    if case.tokens == 0:
        return 0.0
    return float((output_TI.double() - expected_TI).norm() / expected_TI.norm())


def main() -> None:
    """Run every case and print the largest error of all processes for each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    errors = torch.tensor([error_of(case) for case in cases()], dtype=torch.float64)
    dist.all_reduce(errors, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        names = [str(case) for case in cases()]
        sys.stdout.write(json.dumps(dict(zip(names, errors.tolist(), strict=True))))
        sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

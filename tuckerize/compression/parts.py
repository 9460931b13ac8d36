"""Compression expert by expert, of a layer whose dense experts memory does not hold.

Where widths alone shrink, an expert's matrices depend on no other expert once the neurons that all
keep are known. What is alive then is one dense expert, and the codes of those before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from tuckerize.compression.factors import GroupFactors, GroupStep
from tuckerize.compression.target import CompressionTarget, LayerPiece
from tuckerize.domain import Projection, StackShape
from tuckerize.linalg.quantise import QuantisedMatrices
from tuckerize.linalg.selection import KeptNeurons
from tuckerize.linalg.tucker import TuckerFactors, squared_norm
from tuckerize.progress import Stage, silent, told


def has_parts(piece: LayerPiece, shape: StackShape) -> bool:
    """Whether a layer can be compressed expert by expert: quantised, and without any factor.

    Args:
        piece: Targets of its groups.
        shape: Sizes (E, H, I) of one group's stack.
    """

    def is_plain(target: CompressionTarget) -> bool:
        slim = shape._replace(intermediate=target.neurons)
        return not any(rank.truncated_modes(slim) for rank in target.ranks.values())

    return piece.cores is not None and all(map(is_plain, piece.targets))


def in_parts(
    group: GroupFactors, kept: KeptNeurons | None, step: GroupStep, *, stage: Stage = silent
) -> GroupFactors:
    """Carry out a step on one expert of a group after another, with its dense matrices in memory.

    Args:
        group: The dense experts.
        kept: The neurons that they keep; None for all.
        step: Is given a group of one expert, and quantises its cores.
        stage: Is told the experts, with shares of all of them as efforts.

    Returns:
        The group, with relative residuals. The values of its cores are left to their codes: the
        cores themselves are on the meta device.
    """
    experts = group.dense.shape.experts
    joined: dict[Projection, QuantisedMatrices] = {}
    biases: dict[Projection, list[Tensor]] = {p: [] for p in group.biases}
    lost: dict[Projection, list[tuple[float, float]]] = {p: [] for p in group.factors}
    for place in told(range(experts), experts, stage, "down and rounding"):
        dense = group.dense.part(place)
        own = GroupFactors.of(group.index, dense, group.target)
        part = step(replace(own, kept=kept and kept.of_experts(slice(place, place + 1))))
        for projection, found in part.quantised.items():
            if not place:
                joined[projection] = _empty(found, experts)
            joined[projection].codes[place] = found.codes[0]
            joined[projection].scales[place] = found.scales[0]
            stack_1HI = dense.stacks[projection]
            lost[projection].append((part.residual(projection), squared_norm(stack_1HI)))
        for projection, bias in part.biases.items():
            biases[projection].append(bias)
    return replace(
        group,
        factors={
            p: TuckerFactors(torch.empty(_core_shape(p, found), device="meta"))
            for p, found in joined.items()
        },
        kept=kept,
        quantised=joined,
        # Those of down are of all experts already.
        biases={p: own[0] if p == Projection.DOWN else torch.cat(own) for p, own in biases.items()},
        residuals={p: _residual(parts) for p, parts in lost.items()},
    )


def _empty(found: QuantisedMatrices, experts: int) -> QuantisedMatrices:
    """Codes and scales of so many experts, to be filled in."""
    codes, scales = (own.new_empty(experts, *own.shape[1:]) for own in (found.codes, found.scales))
    return replace(found, codes=codes, scales=scales)


def _core_shape(projection: Projection, found: QuantisedMatrices) -> torch.Size:
    """Shape of the core, whose matrices are transposed in down."""
    codes = found.codes.mT if projection == Projection.DOWN else found.codes
    return codes.shape


def _residual(parts: Iterable[tuple[float, float]]) -> float:
    """Relative residual of all experts, of each one's residual and squared norm."""
    both = [(own**2 * norm if norm else 0.0, norm) for own, norm in parts]
    missed, total = (math.fsum(values) for values in zip(*both, strict=True))
    return math.sqrt(missed / total) if total else 0.0

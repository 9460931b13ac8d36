"""Data-free compression: HOOI of the stacks themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tuckerize.calibration.tokens import DenseGroup
from tuckerize.compression.factors import (
    GroupFactors,
    GroupStep,
    LayerFactors,
    compress,
    for_each_group,
    rounding,
)
from tuckerize.compression.quantise import round_cores
from tuckerize.compression.target import CompressionTarget, LayerPiece
from tuckerize.domain import Coupling, Engine, MultilinearRank, group_experts
from tuckerize.linalg.hooi import hooi
from tuckerize.linalg.rank_choice import rank_for_tolerance
from tuckerize.linalg.tensorly_engine import tensorly_tucker
from tuckerize.moe.source import SourceModel
from tuckerize.weight_types import WeightType

_ENGINES = {Engine.TUCKERIZE: hooi, Engine.TENSORLY: tensorly_tucker}


def decompose_piece(
    source: SourceModel,
    piece: LayerPiece,
    weights: WeightType,
    *,
    engine: Engine,
    max_sweeps: int,
    device: torch.device,
) -> Iterator[LayerFactors]:
    """Decompose the stacks of a piece, one group in memory at a time.

    Args:
        source: The dense model.
        piece: Stacks to decompose, and their targets.
        weights: Type of the stored cores and factors.
        engine: Implementation of HOOI.
        max_sweeps: Upper bound on its sweeps.
        device: Where the products run.

    Raises:
        DecompositionError: A stack cannot be decomposed.
    """
    steps = (
        for_each_group(hooi_step(weights, engine=engine, max_sweeps=max_sweeps)),
        *([round_cores(weights, piece.cores)] if piece.cores else []),
        rounding(weights),
    )
    for index in range(len(piece.targets)):
        yield compress(_dense(source, piece, index, device), steps)


def _dense(
    source: SourceModel, piece: LayerPiece, index: int, device: torch.device
) -> LayerFactors:
    """One group of a piece before the first step."""
    shape, target = source.moe.shape, piece.targets[index]
    experts = group_experts(shape, shape.experts // len(piece.targets), index)
    stacks = {
        projection: source.stack(piece.layer, projection, experts).to(device)
        for coupling in target.couplings
        for projection in coupling
    }
    biases = source.biases(piece.layer, experts)
    own = {p: bias.to(device) for p, bias in biases.items() if p in stacks}
    group = GroupFactors.of(index, DenseGroup(stacks, experts, own), target)
    return LayerFactors(piece.layer, (group,))


def hooi_step(weights: WeightType, *, engine: Engine, max_sweeps: int) -> GroupStep:
    """The step that decomposes dense stacks to core sizes or within a tolerance.

    Args:
        weights: Type of the stored cores and factors; rounding to it spends a part of a tolerance.
        engine: Implementation of HOOI.
        max_sweeps: Upper bound on its sweeps.
    """

    def rank_of(
        stacks: list[Tensor], target: CompressionTarget, coupling: Coupling
    ) -> MultilinearRank:
        if target.tolerance is None:
            return target.ranks[coupling]
        rest = target.tolerance**2 - weights.rounding**2
        return rank_for_tolerance(stacks, rest**0.5)

    def decompose(group: GroupFactors) -> GroupFactors:
        factors, sweeps = dict(group.factors), dict(group.sweeps)
        for coupling in group.target.couplings:
            stacks = [group.dense.stacks[projection] for projection in coupling]
            rank = rank_of(stacks, group.target, coupling)
            found = _ENGINES[engine](stacks, rank, max_sweeps=max_sweeps)
            factors.update(zip(coupling, found.tensors, strict=True))
            sweeps.update(dict.fromkeys(coupling, found.sweeps))
        return replace(group, factors=factors, sweeps=sweeps)

    return decompose

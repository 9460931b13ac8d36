"""The data-free path decomposes every group as HOOI alone does, to the type that is stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tuckerize.compression.data_free import decompose_piece
from tuckerize.compression.target import CompressionTarget, LayerPiece
from tuckerize.domain import DOWN, GATE_UP, Coupling, Engine, MultilinearRank
from tuckerize.linalg.hooi import hooi
from tuckerize.linalg.tucker import relative_residual
from tuckerize.moe.source import SourceModel
from tuckerize.weight_types import WEIGHT_TYPES

CPU = torch.device("cpu")
FULL = MultilinearRank(4, 24, 32)  # of the tiny model, in two groups


@pytest.mark.parametrize("coupling", [GATE_UP, DOWN], ids=str)
def test_every_group_is_what_hooi_gives_for_its_stacks(
    tiny_model: Path, coupling: Coupling
) -> None:
    source, rank = SourceModel.open(tiny_model), MultilinearRank(3, 12, 20)
    piece = LayerPiece(1, (CompressionTarget(24, {coupling: rank}),) * 2)
    parts = decompose_piece(
        source, piece, WEIGHT_TYPES["F32"], engine=Engine.TUCKERIZE, max_sweeps=3, device=CPU
    )
    for index, part in enumerate(parts):
        (group,) = part.groups
        experts = range(4 * index, 4 * index + 4)
        stacks = [source.stack(1, projection, experts) for projection in coupling]
        expected = hooi(stacks, rank, max_sweeps=3)
        assert (group.index, group.dense.experts, part.layer) == (index, experts, 1)
        for projection, stack, tensor in zip(coupling, stacks, expected.tensors, strict=True):
            found = group.factors[projection]
            assert torch.equal(group.dense.stacks[projection], stack)
            assert found.rank == rank == group.rank(projection)
            assert torch.equal(found.core, tensor.core)
            assert group.sweeps[projection] == expected.sweeps
    assert index == 1


@pytest.mark.parametrize("tolerance", [0.3, 0.6])
def test_a_tolerance_holds_after_rounding_to_the_stored_type(
    tiny_model: Path, tolerance: float
) -> None:
    piece = LayerPiece(2, (CompressionTarget(24, {DOWN: FULL}, tolerance),) * 2)
    for part in decompose_piece(
        SourceModel.open(tiny_model),
        piece,
        WEIGHT_TYPES["BF16"],
        engine=Engine.TUCKERIZE,
        max_sweeps=2,
        device=CPU,
    ):
        (group,) = part.groups
        (stack,), (factors,) = group.dense.stacks.values(), group.factors.values()
        assert factors.core.dtype == torch.bfloat16
        assert factors.rank != FULL
        assert relative_residual(stack, factors) <= tolerance

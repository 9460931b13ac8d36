from __future__ import annotations

import pytest

from tuckerize.compression.target import CompressionTarget, LayerPiece
from tuckerize.domain import DOWN, GATE_UP, MultilinearRank, Projection, StackShape
from tuckerize.recipe import CalibrationSettings
from tuckerize.weight_types import WEIGHT_TYPES

SHAPE = StackShape(4, 10, 8)
TARGET = CompressionTarget(6, {GATE_UP: MultilinearRank(4, 6, 5), DOWN: MultilinearRank(4, 6, 8)})


def test_target_counts_what_stacks_of_its_width_store() -> None:
    assert TARGET.stored_parameters(SHAPE, GATE_UP) == 2 * 4 * 6 * 5 + 8 * 5
    assert TARGET.stored_parameters(SHAPE, DOWN) == 4 * 6 * 8
    assert TARGET.stored_bytes(SHAPE, GATE_UP, WEIGHT_TYPES["F32"]) == 4 * (2 * 4 * 6 * 5 + 8 * 5)


@pytest.mark.parametrize(
    ("neurons", "rank", "dense"),
    [(10, (4, 10, 8), True), (9, (4, 9, 8), False), (10, (4, 10, 7), False)],
)
def test_target_is_dense_if_nothing_is_truncated(
    neurons: int, rank: tuple[int, int, int], dense: bool
) -> None:
    full = MultilinearRank(4, 10, 8)
    target = CompressionTarget(neurons, {GATE_UP: full, DOWN: MultilinearRank(*rank)})
    assert target.is_dense(SHAPE) == dense


def test_piece_sums_up_its_groups_and_is_named_after_what_it_holds() -> None:
    whole = LayerPiece(12, (TARGET, TARGET), CalibrationSettings(texts=("text",)))
    lone = LayerPiece(12, (CompressionTarget(10, {(Projection.UP,): MultilinearRank(4, 10, 2)}),))
    assert (whole.name, lone.name) == ("layer-00012", "layer-00012-up_proj")
    one = sum(TARGET.stored_parameters(SHAPE, coupling) for coupling in (GATE_UP, DOWN))
    assert whole.stored_parameters(SHAPE) == 2 * one
    assert whole.stored_bytes(SHAPE, WEIGHT_TYPES["BF16"]) == 4 * one
    assert lone.couplings == ((Projection.UP,),)

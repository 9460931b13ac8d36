"""Estimates of memory against what was measured at the width of DeepSeek-V2-Lite.

The figures are those of benchmarks/full_width.py, on two cores, with bfloat16 weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tuckerize.compression.target import CompressionTarget, LayerPiece
from tuckerize.domain import DOWN, GATE_UP, Coupling, MultilinearRank, Projection, StackShape
from tuckerize.errors import UsageError
from tuckerize.moe.source import SourceModel
from tuckerize.planning.budget import Budget
from tuckerize.planning.calibrated_memory import LayerWork, has_parts_of
from tuckerize.planning.estimate import (
    BASE_BYTES,
    data_free_bytes,
    need_within,
    peak_need,
    process_bytes,
)
from tuckerize.planning.plan import Plan, make_plan
from tuckerize.planning.uniform import BudgetUnit, ranks_for_budget
from tuckerize.recipe import CalibrationSettings
from tuckerize.recipe_reader import parse_recipe
from tuckerize.weight_types import WEIGHT_TYPES

LITE = StackShape(64, 1408, 2048)
BF16 = WEIGHT_TYPES["BF16"]
CORES = 2
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
LONE: list[Coupling] = [(projection,) for projection in Projection]


def measured_bytes(file: str, command: str) -> float:
    """Largest peak of a command, over the numbers of layers that it was measured with."""
    steps = json.loads((RESULTS / file).read_text())["steps"]
    peaks = [step["peak_gib"] for step in steps if step["command"] == command]
    assert peaks
    return float(max(peaks) * 2**30)


def estimated_bytes(couplings: Sequence[Coupling], ranks: Sequence[MultilinearRank]) -> int:
    pieces = [
        LayerPiece(1, (CompressionTarget(LITE.intermediate, {coupling: rank}),))
        for coupling, rank in zip(couplings, ranks, strict=True)
    ]
    largest = max(data_free_bytes(LITE, piece, BF16, BF16) for piece in pieces)
    return process_bytes(LITE, CORES) + largest


@pytest.mark.parametrize(
    ("options", "couplings"),
    [("--keep 0.75", LONE), ("--keep 0.75 --joint gate_up --overwrite", [GATE_UP, DOWN])],
)
def test_memory_of_a_data_free_budget_is_what_was_measured(
    options: str, couplings: list[Coupling]
) -> None:
    ranks = ranks_for_budget([BudgetUnit(LITE, len(own), BF16) for own in couplings], Budget(0.75))
    measured = measured_bytes(
        "full_width.json", f"tuckerize decompose --model model --output out {options}"
    )
    assert estimated_bytes(couplings, ranks) == pytest.approx(measured, rel=0.1)


def test_memory_of_core_sizes_in_all_modes_is_what_was_measured() -> None:
    measured = measured_bytes(
        "full_width.json",
        "tuckerize decompose --model model --output out --rank 32,704,1024 --max-sweeps 0 "
        "--overwrite",
    )
    ranks = [MultilinearRank(32, 704, 1024)] * 3
    assert estimated_bytes(LONE, ranks) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("narrow", [2, 4])
def test_memory_of_a_calibrated_layer_is_what_was_measured(narrow: int) -> None:
    """Of core sizes full,full,75%, with five steps; at a part of the width."""
    (row,) = (
        row
        for row in json.loads((RESULTS / "calibrated_memory.json").read_text())
        if row["narrow"] == narrow
    )
    shape = StackShape(64, LITE.intermediate // narrow, LITE.hidden // narrow)
    ranks = dict.fromkeys(LONE, MultilinearRank(*shape)._replace(hidden=shape.hidden * 3 // 4))
    settings = CalibrationSettings(texts=("text",), refine=5)
    piece = LayerPiece(1, (CompressionTarget(shape.intermediate, ranks),), settings)
    estimated = BASE_BYTES + LayerWork(shape, 8192, 512, 6).compression_bytes(piece)
    assert estimated == pytest.approx(row["own_gib"] * 2**30, rel=0.15)


@pytest.mark.parametrize(
    ("target", "how", "in_parts"),
    [
        ("free", {"quantize": "w8"}, False),
        ("any-engine", {}, False),
        ("any-engine", {"quantize": "w8"}, True),
    ],
)
def test_only_quantised_layers_without_factors_are_planned_expert_by_expert(
    tiny_model: Path, target: str, how: dict[str, str], *, in_parts: bool
) -> None:
    calibration = {"texts": ["text"], "refine": 0, "target": target}
    recipe = {"rules": [{"keep": 0.5}], "calibration": calibration, **how}
    plan = make_plan(SourceModel.open(tiny_model), parse_recipe(recipe, place="test"))
    assert has_parts_of(plan) == in_parts
    with pytest.raises(UsageError, match="a process needs about") as caught:
        need_within(plan, 0)
    assert ("goes expert by expert" in (caught.value.hint or "")) != in_parts


def test_states_leave_memory_before_experts_do(tiny_model: Path) -> None:
    calibration = {"texts": ["text"], "refine": 0, "target": "any-engine", "tokens": 8192}
    recipe = {"rules": [{"keep": 0.5}], "quantize": "w8", "calibration": calibration}
    plan = make_plan(SourceModel.open(tiny_model), parse_recipe(recipe, place="test"))

    def peak(*, states: bool, experts: bool) -> int:
        held = {"states_held": states, "profile_held": experts, "held": experts}
        return peak_need(plan, 1, 1, **held).bytes - BASE_BYTES

    all_held = peak(states=True, experts=True)
    of_states, of_nothing = (peak(states=False, experts=own) for own in (True, False))
    assert of_nothing < of_states < all_held
    for available, states, experts in (
        (all_held, True, True),
        (of_states, False, True),
        (of_nothing, False, False),
    ):
        need = need_within(plan, available)
        assert (need.states_held, need.held) == (states, experts)
    # Memory of an accelerator has no files.
    with pytest.raises(UsageError):
        need_within(plan, of_nothing, on_host=False)


@pytest.mark.parametrize("shape", ["latent", "neurons", "auto", "full"])
def test_sizes_before_a_profile_are_those_that_a_budget_pays_for(
    tiny_model: Path, shape: str
) -> None:
    calibration = {"texts": ["text"], "shape": shape, "multiple": 1}
    recipe = {"rules": [{"keep": 0.6}], "calibration": calibration}
    plan = make_plan(SourceModel.open(tiny_model), parse_recipe(recipe, place="test"))
    dense = plan.group_shape
    for piece in plan.layer_pieces:
        cores = sum(
            len(coupling) * math.prod(rank) for coupling, rank in piece.targets[0].ranks.items()
        )
        assert cores / (3 * dense.parameters) == pytest.approx(0.6, abs=0.08)


def test_memory_of_threads_is_eight_matrices_each() -> None:
    matrix = 4 * LITE.intermediate * LITE.hidden
    assert process_bytes(LITE, 9) - process_bytes(LITE, 1) == 8 * 8 * matrix


def plan_of(model: Path, rank: str, **how: object) -> Plan:
    recipe = parse_recipe({"rules": [{"rank": rank}], **how}, place="test")
    return make_plan(SourceModel.open(model), recipe)


def peak_bytes(plan: Plan, threads: int | None = None) -> int:
    return peak_need(plan, threads or torch.get_num_threads(), processes=1).bytes


def test_memory_of_a_plan_is_that_of_its_process_and_largest_piece(tiny_model: Path) -> None:
    plan = plan_of(tiny_model, "full,full,16", joint="gate_up")
    largest = max(
        data_free_bytes(plan.group_shape, piece, BF16, BF16) for piece in plan.layer_pieces
    )
    process = process_bytes(plan.group_shape, torch.get_num_threads())
    assert peak_bytes(plan) == process + largest


def test_memory_grows_with_stacks_that_are_taken_together(tiny_model: Path) -> None:
    rank = "full,full,16"
    sizes = [
        peak_bytes(plan_of(tiny_model, rank, group_size=2)),
        peak_bytes(plan_of(tiny_model, rank)),
        peak_bytes(plan_of(tiny_model, rank, joint="gate_up")),
    ]
    assert sizes == sorted(set(sizes))


def test_threads_are_as_many_as_memory_allows(tiny_model: Path) -> None:
    plan = plan_of(tiny_model, "full,full,50%")
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        libraries = process_bytes(plan.group_shape, 0)
        for threads in (1, 2, 4):
            least = peak_bytes(plan, threads) - libraries
            assert need_within(plan, least).threads == threads
            if threads > 1:
                assert need_within(plan, least - 1).threads == threads - 1
        with pytest.raises(UsageError, match="a process needs about") as caught:
            need_within(plan, 0)
        assert "0.0 GiB of memory are free" in caught.value.message
    finally:
        torch.set_num_threads(before)

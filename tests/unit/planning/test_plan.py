from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tuckerize.domain import MultilinearRank, StackShape
from tuckerize.errors import MultilinearRankError, RecipeError, UsageError
from tuckerize.moe.source import SourceModel
from tuckerize.pipeline.inspect import describe_plan
from tuckerize.planning.plan import CopyPiece, Plan, make_plan, output_fingerprint
from tuckerize.recipe_reader import parse_recipe


def plan_of(model: Path, *rules: dict[str, object], **how: object) -> Plan:
    recipe = parse_recipe({"rules": list(rules), **how}, place="test")
    return make_plan(SourceModel.open(model), recipe)


def ranks_of(plan: Plan) -> dict[tuple[int, str], list[MultilinearRank | None]]:
    return {
        (piece.layer, "+".join(coupling)): [
            target.ranks[coupling] if target.tolerance is None else None for target in piece.targets
        ]
        for piece in plan.layer_pieces
        for coupling in piece.couplings
    }


def test_plan_of_one_rank_has_it_for_every_stack(tiny_model: Path) -> None:
    plan = plan_of(tiny_model, {"rank": "full,50%,8"}, group_size=4)
    expected = [MultilinearRank(4, 12, 8)] * 2
    assert set(ranks_of(plan)) == {
        (layer, projection)
        for layer in (1, 2)
        for projection in ("gate_proj", "up_proj", "down_proj")
    }
    assert all(ranks == expected for ranks in ranks_of(plan).values())
    assert (plan.layers, plan.group_shape) == ((1, 2), StackShape(4, 24, 32))
    assert (plan.weights.name, plan.weights.bits) == ("BF16", 16)


def test_plan_of_several_rules_follows_the_first_that_matches(tiny_model: Path) -> None:
    plan = plan_of(
        tiny_model,
        {"layers": "2", "projections": ["down_proj"], "rank": "1,1,1"},
        {"layers": "2", "tolerance": 0.5},
        {"rank": "2,2,2"},
        joint="gate_up",
        dtype="float32",
    )
    assert ranks_of(plan) == {
        (1, "gate_proj+up_proj"): [MultilinearRank(2, 2, 2)],
        (1, "down_proj"): [MultilinearRank(2, 2, 2)],
        (2, "gate_proj+up_proj"): [None],
        (2, "down_proj"): [MultilinearRank(1, 1, 1)],
    }
    assert plan.layer_pieces[2].targets[0].tolerance == 0.5
    assert plan.weights.name == "F32"


def test_plan_of_keep_shares_one_budget_over_its_stacks(tiny_model: Path) -> None:
    plan = plan_of(tiny_model, {"keep": 0.5}, joint="gate_up")
    stored = sum(piece.stored_parameters(plan.group_shape) for piece in plan.layer_pieces)
    budget = plan.source.moe.routed_parameters * 0.5
    assert budget - (8 * 24 + 32) < stored <= budget


def test_plan_of_some_projections_keeps_the_others_of_the_layer_full(tiny_model: Path) -> None:
    plan = plan_of(tiny_model, {"layers": "1", "projections": ["up_proj"], "rank": "4,4,4"})
    assert ranks_of(plan) == {
        (1, "gate_proj"): [MultilinearRank(8, 24, 32)],
        (1, "up_proj"): [MultilinearRank(4, 4, 4)],
        (1, "down_proj"): [MultilinearRank(8, 24, 32)],
    }


@pytest.mark.parametrize("fixture", ["tiny_model", "tiny_sharded_model"])
def test_plan_copies_exactly_the_tensors_that_it_does_not_decompose(
    request: pytest.FixtureRequest, fixture: str
) -> None:
    plan = plan_of(request.getfixturevalue(fixture), {"layers": "2", "keep": 0.5})
    copied = [
        name for piece in plan.pieces if isinstance(piece, CopyPiece) for name in piece.tensors
    ]
    routed = [
        n
        for n in plan.source.checkpoint.tensors
        if re.match(r"model\.layers\.2\.mlp\.experts\.", n)
    ]
    assert len(routed) == 24
    assert sorted(copied + routed) == sorted(plan.source.checkpoint.tensors)


@pytest.mark.parametrize("fixture", ["tiny_model", "tiny_sharded_model"])
def test_plan_numbers_the_weight_files_without_gaps(
    request: pytest.FixtureRequest, fixture: str
) -> None:
    plan = plan_of(request.getfixturevalue(fixture), {"keep": 0.5})
    names = [plan.weight_file(piece) for piece in plan.pieces]
    writing = [p for p in plan.pieces if not isinstance(p, CopyPiece) or p.tensors]
    count = len(writing)
    expected = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert [name for name in names if name] == expected
    assert [plan.weight_file(piece) for piece in writing] == expected
    assert len({piece.name for piece in plan.pieces}) == len(plan.pieces)


def test_plan_with_different_rules_for_joint_projections_is_refused(tiny_model: Path) -> None:
    rules: list[dict[str, object]] = [
        {"layers": "2", "projections": ["gate_proj"], "keep": 0.5},
        {"keep": 0.6},
    ]
    with pytest.raises(RecipeError) as caught:
        plan_of(tiny_model, *rules, joint="gate_up")
    assert caught.value.message == (
        "gate_proj and up_proj of layer 2 share one U_I but follow different rules"
    )
    with pytest.raises(RecipeError):
        plan_of(tiny_model, rules[0], joint="gate_up")


@pytest.mark.parametrize("size", [3, 16])
def test_plan_with_a_group_size_that_does_not_divide_lists_those_that_do(
    tiny_model: Path, size: int
) -> None:
    with pytest.raises(UsageError) as caught:
        plan_of(tiny_model, {"keep": 0.5}, group_size=size)
    assert caught.value.message == f"group size {size} does not divide the 8 experts of a layer"
    assert caught.value.hint == "choose one of 1, 2, 4, 8"


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2**-7), ("float16", 2**-10)])
def test_plan_with_a_tolerance_below_the_rounding_is_refused(
    tiny_model: Path, dtype: str, tolerance: float
) -> None:
    with pytest.raises(UsageError, match="is not above the rounding of"):
        plan_of(tiny_model, {"tolerance": tolerance}, dtype=dtype)
    plan_of(tiny_model, {"tolerance": tolerance * 1.01}, dtype=dtype)


@pytest.mark.parametrize(
    ("how", "what"),
    [({"joint": "gate_up"}, "share one U_I"), ({"max_sweeps": 0}, "run without a sweep")],
)
def test_plan_for_tensorly_of_what_it_cannot_do_is_refused(
    tiny_model: Path, how: dict[str, object], what: str
) -> None:
    with pytest.raises(UsageError, match=f"the engine tensorly cannot {what}"):
        plan_of(tiny_model, {"keep": 0.5}, engine="tensorly", **how)


def test_plan_with_a_rank_above_its_mode_is_refused(tiny_model: Path) -> None:
    with pytest.raises(MultilinearRankError):
        plan_of(tiny_model, {"rank": "9,24,32"})


def test_plan_for_a_layer_without_experts_is_refused(tiny_model: Path) -> None:
    with pytest.raises(RecipeError, match="names layer 0 without routed experts"):
        plan_of(tiny_model, {"layers": "0", "keep": 0.5})


def fingerprint_of(model: Path, keep: float = 0.5, text: str = "") -> dict[str, object]:
    recipe = parse_recipe({"rules": [{"keep": keep}]}, place="test")
    return output_fingerprint(SourceModel.open(model), recipe, text)


def test_output_fingerprint_is_json_and_changes_with_the_recipe_and_the_text(
    tiny_model: Path,
) -> None:
    first = fingerprint_of(tiny_model)
    assert json.loads(json.dumps(first)) == first
    assert fingerprint_of(tiny_model) == first
    assert fingerprint_of(tiny_model, keep=0.6) != first
    assert fingerprint_of(tiny_model, text="ab12") != first


def test_output_fingerprint_changes_with_the_source(
    tiny_model: Path, tiny_sharded_model: Path
) -> None:
    first = fingerprint_of(tiny_model)["tensors_sha256"]
    assert fingerprint_of(tiny_sharded_model)["tensors_sha256"] != first


def test_describe_plan_sums_up_its_stacks(tiny_model: Path) -> None:
    plan = plan_of(tiny_model, {"rank": "full,full,16"}, group_size=4, joint="gate_up")
    report = describe_plan(plan, peak=0)
    assert len(report.stacks) == 2 * 2 * 2
    dense, latent = 4 * 24 * 32, 4 * 24 * 16
    assert {s.projection: (s.bytes_before, s.bytes_after) for s in report.stacks} == {
        "gate_up_proj": (2 * dense * 2, (2 * latent + 32 * 16) * 2),
        "down_proj": (dense * 2, (latent + 32 * 16) * 2),
    }
    before, after = report.before, report.after
    assert before.routed_bytes == sum(s.bytes_before for s in report.stacks)
    assert after.routed_bytes == sum(s.bytes_after for s in report.stacks)
    assert before.total_bytes - after.total_bytes == before.routed_bytes - after.routed_bytes
    assert after.routed_parameters * 2 == after.routed_bytes
    assert before.total_bytes == plan.source.checkpoint.bytes


def test_describe_plan_of_a_tolerance_counts_the_dense_stacks_as_bound(tiny_model: Path) -> None:
    report = describe_plan(plan_of(tiny_model, {"tolerance": 0.5}), peak=0)
    assert report.after == report.before
    assert {stack.multilinear_rank for stack in report.stacks} == {None}

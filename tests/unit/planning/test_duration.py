"""Laws of estimated times, and the figures of benchmarks/durations.py, which their range holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tuckerize.domain import Size
from tuckerize.moe.source import SourceModel
from tuckerize.planning import duration as module
from tuckerize.planning.duration import (
    announce,
    duration,
    plan_duration,
    product_rate,
    training_work,
    work,
)
from tuckerize.planning.plan import Plan, make_plan
from tuckerize.progress import SilentProgress
from tuckerize.recipe_reader import parse_recipe
from tuckerize.report.plans import Duration

MEASURED = Path(__file__).parents[3] / "benchmarks" / "results" / "durations.json"


def plan_of(model: Path, rank: str, **how: object) -> Plan:
    recipe = parse_recipe({"rules": [{"rank": rank}], **how}, place="test")
    return make_plan(SourceModel.open(model), recipe)


@given(st.floats(1e6, 1e18), st.floats(0, 1e12))
def test_range_holds_its_middle_and_grows_with_the_work(operations: float, copied: float) -> None:
    found = duration(operations, copied)
    products = operations / product_rate()
    assert found.least < products * sum(found.times_products) / 2 + copied / 3e8 < found.most
    twice = duration(2 * operations, 2 * copied)
    assert twice.least == pytest.approx(2 * found.least)
    assert found.most < twice.most <= 2 * found.most


def test_time_of_a_plan_scales_with_its_layers(tiny_model: Path) -> None:
    whole = plan_of(tiny_model, "full,full,16")
    first = replace(whole, layer_pieces=whole.layer_pieces[:1])
    copied = duration(0, whole.source.checkpoint.bytes)
    ones, all_ = (plan_duration(own).least - copied.least for own in (first, whole))
    assert all_ == pytest.approx(len(whole.layer_pieces) * ones)
    assert len(whole.layer_pieces) > 1


def test_work_grows_with_the_modes_that_are_truncated(tiny_model: Path) -> None:
    totals = []
    for rank in ("full,full,full", "full,full,16", "full,12,16", "4,12,16"):
        plan = plan_of(tiny_model, rank)
        totals.append(work(plan, plan.layer_pieces[0]))
    assert totals == sorted(set(totals))


def test_work_of_a_copy_is_its_bytes(tiny_model: Path) -> None:
    plan = plan_of(tiny_model, "full,full,16")
    assert sum(work(plan, copy) for copy in plan.copies) == plan.source.checkpoint.bytes


def test_training_is_two_operations_for_each_active_parameter_and_forward() -> None:
    size = Size(800, 1600, 1000, 2000)
    found = training_work(size, active_share=0.25, tokens=1000, judged=10, forwards=3)
    assert found == 2 * (200 + 0.25 * 800) * (3 * 1000 + 10)


@pytest.mark.parametrize(
    "run",
    json.loads(MEASURED.read_text())["runs"],
    ids=lambda run: f"{run['name']} {run['hidden']}",
)
def test_measured_times_are_within_the_range(
    run: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "product_rate", lambda: run["rate"])
    found = duration(run["operations"], run["copied_bytes"])
    assert found.least <= run["seconds"] <= found.most


@pytest.mark.parametrize(
    ("most", "words"),
    [
        (6, "at most 6 s "),
        (12.3, "about 1.2 to 12 s "),
        (600, "about 1 to 10 min "),
        (36000, "about 1 to 10 h "),
        (864000, "about 1 to 10 days "),
    ],
)
def test_text_has_the_range_and_its_basis(most: float, words: str) -> None:
    found = Duration(most / 10, most, 38.4e9, (0.8, 3.0))
    basis = "(0.8 to 3 times its products at 38 GFLOP/s, measured on the CPU now)"
    assert found.text == f"{words}{basis}"


def test_only_long_work_on_the_cpu_is_announced() -> None:
    class Heard(SilentProgress):
        def note(self, text: str) -> None:
            notes.append(text)

    notes: list[str] = []
    cpu, long = torch.device("cpu"), Duration(60, 120, 1e9, (1, 2))
    announce(Duration(1, 59, 1e9, (1, 2)), "the work", cpu, Heard())
    announce(long, "the work", torch.device("cuda"), Heard())
    assert not notes
    announce(long, "the work", cpu, Heard())
    assert notes == [f"the work takes {long.text}"]

"""Quantisation alone at a size between its rows, and what engines have kernels for."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.quality.equal_bytes import RESULTS, read
from benchmarks.quality.equal_bytes_tables import alone, name, ours, tables
from benchmarks.quality.servable import WEIGHTS, is_servable, is_trellis
from benchmarks.quality.trellis import Trellis


def row(bits: float, kl: float, structure: str = "dense") -> dict[str, Any]:
    return {
        "bits": bits,
        "structure": structure,
        "target": "free",
        "encoding": "w4",
        "in_domain": {"kl": kl},
        "out_of_domain": {"kl": 2 * kl},
    }


ROWS = [row(2, 40), row(3, 10), row(4, 2), row(2.5, 1, "tuckerize")]


@pytest.mark.parametrize(
    ("bits", "kl"), [(1.9, None), (2, 40), (2.5, 25), (2.9, 13), (3.5, 6), (4, 2), (9, 2)]
)
def test_rows_are_mixed_to_the_size(bits: float, kl: float | None) -> None:
    assert alone(ROWS, bits, "in_domain") == pytest.approx(kl)


def test_the_better_of_two_ways_of_rounding_counts() -> None:
    assert alone([*ROWS, row(2, 30)], 2.5, "in_domain") == pytest.approx(20)
    assert alone([*ROWS, row(3.2, 90)], 3.5, "in_domain") == pytest.approx(6)


def test_ours_are_rows_that_are_no_larger_and_what_lies_between_two_of_one_setting() -> None:
    own = [row(2, 16, "tuckerize"), row(4, 4, "tuckerize"), row(9, 1)]
    small, between = ours(own, 3)
    assert small == {"in_domain": 16, "out_of_domain": 32}
    assert between == pytest.approx({"in_domain": 8, "out_of_domain": 16})
    assert len(ours(own, 5)) == 2
    assert not ours(own, 1)
    other = {**row(5, 1, "tuckerize"), "encoding": "w3"}
    assert len(ours([*own, other], 4.5)) == 2


@pytest.mark.parametrize(
    ("target", "encoding", "platforms"),
    [
        ("free", "--bits 6", {"CUDA", "CPU"}),
        ("fused-kernels", "--bits 6", {"Ascend", "CUDA", "CPU"}),
        ("fused-kernels", "w4", {"Ascend", "CUDA", "CPU"}),
        ("fused-kernels", "w4-g128", {"Ascend", "CUDA", "CPU"}),
        ("any-engine", "w3", {"CUDA"}),
        ("any-engine", "w4 --random-share 0.2", {"Ascend", "CUDA", "CPU"}),
    ],
)
def test_ours_are_servable_where_kernels_are(
    target: str, encoding: str, platforms: set[str]
) -> None:
    own = {**row(6, 1, "tuckerize"), "target": target, "encoding": encoding}
    assert {platform for platform in WEIGHTS if is_servable(own, platform)} == platforms


@pytest.mark.parametrize(("kept", "platforms"), [(64, {"Ascend", "CUDA", "CPU"}), (72, set())])
def test_narrower_experts_are_whole_groups_for_engines(kept: int, platforms: set[str]) -> None:
    narrow = {**row(3, 1, "neuron elimination, equal widths"), "encoding": "4 bits, g32"}
    narrow |= {"model": "large", "multiply_adds": kept / 96}
    assert {platform for platform in WEIGHTS if is_servable(narrow, platform)} == platforms


def test_no_engine_of_ours_has_kernels_for_trellis_codes() -> None:
    coded = {**row(2, 1), "encoding": str(Trellis(2))}
    assert is_trellis(coded)
    assert not any(is_servable(coded, platform) for platform in WEIGHTS)
    assert not is_trellis(row(2, 1))


def test_trellis_codes_are_compared_apart_from_other_quantisation() -> None:
    rows = read(RESULTS)
    section = "### Ours and quantisation alone\n"
    scalar = tables([row for row in rows if not is_trellis(row)])
    assert (
        tables(rows).split(section)[1].split("###")[0] == scalar.split(section)[1].split("###")[0]
    )
    fine = [row for row in rows if row["model"] == "fine"]
    alike = {name(row): row["in_domain"]["kl"] for row in fine}
    bits = {name(row): row["bits"] for row in fine}
    two, three = "QTIP 2 bits, trellis", "QTIP 3 bits, trellis"
    own = "tuckerize 0.8 × w3-g128, free"
    share = (bits[own] - bits[two]) / (bits[three] - bits[two])
    ratio = alike[own] / (alike[two] * (1 - share) + alike[three] * share)
    (line,) = (
        line
        for line in tables(fine).split("### Ours and trellis codes alone")[1].splitlines()
        if f"| {own} |" in line
    )
    assert f"| {ratio:.2f} · " in line

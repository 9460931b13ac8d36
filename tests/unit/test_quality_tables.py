"""Quantisation alone at a size between its rows."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.quality.equal_bytes_tables import alone, ours


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


def test_ours_is_interpolated_between_rows_of_one_encoding() -> None:
    own = [row(2, 16, "tuckerize"), row(4, 4, "tuckerize"), row(9, 1)]
    assert ours(own, 3) == pytest.approx({"in_domain": 8, "out_of_domain": 16})
    assert ours(own, 4) == pytest.approx({"in_domain": 4, "out_of_domain": 8})
    assert not ours(own, 5)
    other = {**row(5, 1, "tuckerize"), "encoding": "w3"}
    assert not ours([*own, other], 4.5)


def test_ours_are_rows_of_one_setting_in_both_domains() -> None:
    first = [row(2, 16, "tuckerize"), row(4, 4, "tuckerize")]
    second = [{**own, "encoding": "w3", "in_domain": {"kl": 5}} for own in first]
    assert ours([*first, *second], 3) == pytest.approx({"in_domain": 5, "out_of_domain": 16})

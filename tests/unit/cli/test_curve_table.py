"""What `plan` says under its table: where quantisation alone is the better choice."""

from __future__ import annotations

import pytest

from tuckerize.cli.curve_table import show_curve
from tuckerize.domain import CoreType, Size, Target
from tuckerize.report.plans import CurvePoint, CurveReport

WHOLE = "no encoding here stores whole experts"
ALONE = "quantisation alone loses least"
WORSE = "quantisation alone is predicted to lose more"
OTHERS = "decompose with --quantize w3"


def point(
    bits: float, *, truncated: bool, encodings: str = "best", target: Target = Target.FREE
) -> CurvePoint:
    return CurvePoint(
        bits, target, encodings, CoreType.W4, 100, 50, 80, 0.01, 0.1, truncated=truncated
    )


def advice(capsys: pytest.CaptureFixture[str], *points: CurvePoint) -> set[str]:
    show_curve(CurveReport("model", Size(100, 200, 120, 240), points))
    text = " ".join(capsys.readouterr().out.split())
    return {words for words in (WHOLE, ALONE, WORSE, OTHERS) if words in text}


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ((point(8, truncated=False), point(6, truncated=False)), {ALONE}),
        ((point(4.5, truncated=False), point(4, truncated=True)), {ALONE}),
        ((point(3.1, truncated=True),), {WHOLE}),
        ((point(3.1, truncated=True, target=Target.ANY_ENGINE),), {WHOLE, OTHERS}),
        ((point(2, truncated=True),), {WHOLE}),
        ((point(5, truncated=True), point(5, truncated=False, encodings="w4")), {WORSE}),
    ],
)
def test_plan_says_where_quantisation_alone_is_the_better_choice(
    points: tuple[CurvePoint, ...], said: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert advice(capsys, *points) == said


def test_plan_names_the_size_down_to_which_quantisation_alone_suffices(
    capsys: pytest.CaptureFixture[str],
) -> None:
    points = (point(8, truncated=False), point(4.5, truncated=False), point(3, truncated=True))
    show_curve(CurveReport("model", Size(100, 200, 120, 240), points))
    assert "from 4.5 bits per weight" in capsys.readouterr().out

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tuckerize.format.card import CARD, write_hub_files
from tuckerize.format.manifest import TuckerManifest, read_tucker_manifest
from tuckerize.format.warnings import is_worse_on_text, warnings_of

GOLDEN = Path(__file__).parents[2] / "golden" / "v0.1" / "calibrated"


def changed(
    residual: float | None = None, measured: float | None = 0.2, predicted: float | None = 0.2
) -> TuckerManifest:
    """A calibrated manifest with errors of its first layer; those of the second are fine."""
    manifest = read_tucker_manifest(GOLDEN)
    first, *others = manifest.stacks
    both = None if measured is None else 0.2
    records = tuple(
        record.model_copy(
            update={
                "output_error": measured if record.layer == 1 else both,
                "predicted_error": predicted if record.layer == 1 else 0.2,
            }
        )
        for record in manifest.calibrated
    )
    stacks = (replace(first, relative_residual=residual or 0.5), *others)
    return manifest.model_copy(update={"calibrated": records, "stacks": stacks})


@pytest.mark.parametrize("errors", [{}, {"measured": 0.39}, {"predicted": None, "measured": 0.9}])
def test_result_as_it_should_be_has_no_warning(errors: dict[str, float | None]) -> None:
    assert warnings_of(changed(**errors)) == ()
    assert warnings_of(read_tucker_manifest(GOLDEN.parent / "data-free")) == ()


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        ({"residual": 3.2}, "layer 1: a stack has the relative residual 3.2: zeros would have 1"),
        ({"measured": 70.0, "predicted": None}, "on the validation set is 70: zeros would have 1"),
        ({"measured": 0.5}, "of 1 of 2 layers is above 2 times the predicted one (layer 1: 0.5"),
        ({"measured": None}, "too few tokens for a validation set"),
    ],
)
def test_result_that_is_not_to_be_trusted_says_why_on_its_card_too(
    errors: dict[str, float | None], message: str, tmp_path: Path
) -> None:
    manifest = changed(**errors)
    [warning] = warnings_of(manifest)
    assert message in warning
    write_hub_files(GOLDEN, tmp_path, manifest, {})
    assert f"> **Warning:** {warning}" in (tmp_path / CARD).read_text()


@pytest.mark.parametrize(
    ("errors", "is_worse"),
    [
        ({"measured": 1.1}, True),
        ({"measured": 1.1, "residual": 3.2}, True),
        ({"measured": 0.9, "residual": 3.2}, False),  # it is good on text
        ({"measured": None, "residual": 3.2}, False),  # quantised since; it was measured
        ({"measured": None, "predicted": None, "residual": 3.2}, False),
        ({"measured": None, "predicted": None, "residual": 0.9}, False),
    ],
)
def test_measured_error_decides(errors: dict[str, float | None], is_worse: bool) -> None:
    assert is_worse_on_text(changed(**errors), 1) == is_worse
    assert not is_worse_on_text(changed(**errors), 2)

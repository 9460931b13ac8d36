"""Settings that several options give together."""

from __future__ import annotations

from typing import Any

from tuckerize.errors import UsageError


def calibration_of(texts: list[str] | None, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The calibration part of a recipe from options; None without a text."""
    given = {name: value for name, value in settings.items() if value is not None}
    if texts:
        return {"texts": texts, **given}
    if given:
        first = next(iter(given))
        option = "calibration-tokens" if first == "tokens" else first.replace("_", "-")
        raise UsageError(
            f"--{option} belongs to --calibration, which is not given",
            hint="add --calibration FILE with a text like those the model is used for",
        )
    return None

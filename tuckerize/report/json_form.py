"""JSON form of the reports."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from tuckerize.report.checkpoint import CheckReport
from tuckerize.report.machine import DoctorReport
from tuckerize.report.verification import VerifyReport

SCHEMA_VERSION = 1


def to_json(report: Any) -> dict[str, Any]:  # noqa: ANN401
    """A report as JSON values, its own derived verdict included."""
    value: dict[str, Any] = {"schema_version": SCHEMA_VERSION, **asdict(report)}
    if isinstance(report, CheckReport | VerifyReport | DoctorReport):
        value["passed"] = report.passed
    return {key: _finite(item) for key, item in value.items()}


def _finite(value: Any) -> Any:  # noqa: ANN401
    """JSON has no NaN and no infinity: they become text."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value

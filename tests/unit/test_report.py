from __future__ import annotations

import json
import math

import pytest

from tuckerize.domain import MultilinearRank, Projection, Size, StackResult
from tuckerize.report.json_form import to_json
from tuckerize.report.results import DecomposeReport
from tuckerize.report.verification import LayerVerdict, VerifyReport


def verify_report(sharding_error: float, *failures: str) -> VerifyReport:
    verdict = LayerVerdict(1, sharding_error, None, 0.5, math.nan, failures)
    return VerifyReport("out", 2, 1, 1, False, "rank", "cpu", 8, 1e-5, (verdict,), ())


@pytest.mark.parametrize(
    ("error", "text"), [(math.inf, "inf"), (-math.inf, "-inf"), (math.nan, "nan")]
)
def test_to_json_of_what_is_not_finite_is_strict_json(error: float, text: str) -> None:
    value = json.loads(json.dumps(to_json(verify_report(error)), allow_nan=False))
    assert value["layers"][0]["sharding_error"] == text
    assert value["layers"][0]["residual_difference"] == "nan"
    assert value["layers"][0]["output_error"] is None


@pytest.mark.parametrize("failures", [(), ("damaged",)])
def test_to_json_of_a_verification_has_its_verdict(failures: tuple[str, ...]) -> None:
    report = verify_report(0.0, *failures)
    assert to_json(report)["passed"] == report.passed == (not failures)


def test_to_json_of_a_decomposition_has_plain_values() -> None:
    stack = StackResult(1, 0, Projection.UP, MultilinearRank(1, 2, 3), 0.25, 2)
    report = DecomposeReport("out", (stack,), Size(1, 2, 3, 4), Size(1, 2, 3, 4), 0, 1.5)
    size = {
        "routed_parameters": 1,
        "routed_bytes": 2,
        "total_parameters": 3,
        "total_bytes": 4,
    }
    assert json.loads(json.dumps(to_json(report))) == {
        "schema_version": 1,
        "output": "out",
        "stacks": [
            {
                "layer": 1,
                "group": 0,
                "projection": "up_proj",
                "multilinear_rank": [1, 2, 3],
                "relative_residual": 0.25,
                "sweeps": 2,
            }
        ],
        "before": size,
        "after": size,
        "resumed_pieces": 0,
        "seconds": 1.5,
        "calibrated": [],
        "predicted_kl": None,
        "notes": [],
        "warnings": [],
    }

"""Record of an evaluation in the folder of the Tucker checkpoint that was compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tuckerize.checkpoint.files import read_json_object, write_json
from tuckerize.checkpoint.output import EVALUATION
from tuckerize.errors import TuckerizeError
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.report.evaluation import EvaluateReport
from tuckerize.report.json_form import to_json

_OF = "tucker_manifest_sha256"


def keep_evaluation(tucker: TuckerCheckpoint, report: EvaluateReport) -> EvaluateReport:
    """Write a comparison with the source to a checkpoint's folder; says so where that fails."""
    path = tucker.folder / EVALUATION
    try:
        write_json(path, {**to_json(report), _OF: tucker.manifest_sha256})
    except OSError as error:
        note = f"the comparison was not kept: {error.strerror} ({path})"
        return replace(report, notes=(*report.notes, note))
    return report


def find_evaluation(tucker: TuckerCheckpoint) -> dict[str, Any] | None:
    """The comparison that was kept of a checkpoint as it is now; None if there is none."""
    path = tucker.folder / EVALUATION
    if not path.exists():
        return None
    try:
        found = read_json_object(path)
    except TuckerizeError:
        return None
    return found if found.get(_OF) == tucker.manifest_sha256 else None


def evaluation_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values of a kept comparison."""
    divergence = found["divergence"]
    source = Path(found["results"][0]["folder"]).name
    rows = [
        (f"perplexity over that of {source}", f"× {_text(divergence['perplexity_ratio'], 4)}"),
        ("KL divergence, nats per token", _text(divergence["kl"], 5)),
        ("same most likely token", _text(divergence["same_top"], 4)),
    ]
    texts = ", ".join(Path(text).name for text in found["texts"])
    return [*rows, ("text", f"{texts}: {found['tokens']:,} tokens, windows of {found['window']}")]


def _text(estimate: dict[str, Any], digits: int) -> str:
    error = estimate["error"]
    return f"{estimate['value']:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")

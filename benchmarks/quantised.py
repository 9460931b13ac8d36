"""Bits per weight and perplexity of the shipped model, over kept share and bits of the cores.

Calibrated on one part of the held-out text, measured on the other. With `--keep 1` nothing is
truncated: the dense experts, quantised alone in the same way.

    python -m benchmarks.quantised --write
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from tuckerize import DecomposeRequest, EvaluateRequest, decompose, evaluate

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "tiny-moe"
RESULTS = ROOT / "benchmarks" / "results" / "quantised.json"
# Of examples/held_out.txt: the characters to measure on, as everywhere in the documentation.
VALIDATION = 40_000
KEPT = (1.0, 0.9, 0.75, 0.5)
ENCODINGS = (None, "w8", "w4")


def measure(
    keep: float, quantize: str | None, folder: Path, *, tokens: int | None, refine: int
) -> dict[str, Any]:
    """One row: a checkpoint, calibrated unless `tokens` is None, and its perplexity.

    Args:
        keep: Kept share of the routed parameters.
        quantize: Encoding of the cores; None for bfloat16.
        folder: Where the checkpoint is written; it holds the texts.
        tokens: Of the calibration.
        refine: Gradient steps of the refinement.
    """
    text = {"texts": [str(folder / "text.txt")], "tokens": tokens, "refine": refine}
    out = folder / f"{keep:g}-{quantize}-{tokens}"
    calibration = None if tokens is None else text
    report = decompose(
        DecomposeRequest(
            model=MODEL, output=out, keep=keep, quantize=quantize, calibration=calibration
        )
    )
    if report is None:
        raise RuntimeError("run it in one process")
    request = EvaluateRequest(model=out, text=str(folder / "validation.txt"), against=MODEL)
    dense, own = evaluate(request).results
    return {
        "keep": keep,
        "quantize": quantize or "none",
        "calibrated": tokens is not None,
        "bits_per_weight": round(report.after.bits_per_weight(report.before), 3),
        "perplexity": round(own.perplexity, 3),
        "ratio": round(own.perplexity / dense.perplexity, 4),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, by falling bits per weight."""
    lines = [
        "| bits per weight | keep | cores | text | perplexity | over dense |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda row: (-row["bits_per_weight"], not row["calibrated"])):
        how = "calibrated" if row["calibrated"] else "data-free"
        lines.append(
            f"| {row['bits_per_weight']:.2f} | {row['keep']:g} | {row['quantize']} | {how} "
            f"| {row['perplexity']:.2f} | {row['ratio']:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure every row and print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384, help="of the calibration")
    parser.add_argument("--refine", type=int, default=100, help="gradient steps")
    parser.add_argument("--write", action="store_true", help="replace the file of results")
    options = parser.parse_args()
    held_out = (ROOT / "examples" / "held_out.txt").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "validation.txt").write_text(held_out[:VALIDATION], encoding="utf-8")
        (folder / "text.txt").write_text(held_out[VALIDATION:], encoding="utf-8")
        for tokens in (None, options.tokens):
            for keep in KEPT:
                for quantize in ENCODINGS:
                    if (keep, quantize) == (1.0, None):
                        continue
                    row = measure(keep, quantize, folder, tokens=tokens, refine=options.refine)
                    rows.append(row)
                    print(json.dumps(row), flush=True)
    print(table(rows))
    if options.write:
        settings = {"tokens": options.tokens, "refine": options.refine}
        RESULTS.write_text(json.dumps({**settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

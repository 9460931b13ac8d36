"""Perplexity of dense, compressed and healed models, for each choice of what is trained.

Every model is calibrated and healed on the same Python text and measured on held-out Python (in
domain) and English (out of domain). Rows are kept: a run that was stopped goes on.

    python -m benchmarks.heal --model fine --size w4      # minutes
    python -m benchmarks.heal                             # prints the table
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tuckerize import DecomposeRequest, EvaluateRequest, HealRequest, decompose, evaluate, heal
from tuckerize.checkpoint.output import MANIFEST

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "heal"
TEXTS = ROOT / "benchmarks" / "quality" / "trained"
MODELS = {
    "tiny-moe": ROOT / "examples" / "tiny-moe",
    "fine": TEXTS / "fine",
    "coarse": TEXTS / "coarse",
}
SIZES: dict[str, dict[str, Any]] = {
    "keep .5": {"keep": 0.5},
    "w4": {"keep": 1.0, "quantize": "w4"},
    "w4 x .65": {"keep": 0.65, "quantize": "w4"},
}
DATA = str(TEXTS / "python_calibration.txt")
HELD_OUT = {
    "in domain": TEXTS / "python_held_out.txt",
    "out of domain": TEXTS / "english_held_out.txt",
}
# What is trained, the share of the KL divergence in the loss, and the learning rate.
CHOICES: tuple[tuple[str, float, float], ...] = (
    ("all", 1.0, 3e-3),
    ("scales", 1.0, 3e-3),
    ("routers,norms", 1.0, 3e-3),
    ("cores", 1.0, 3e-3),
    ("factors", 1.0, 3e-3),
    ("all", 0.0, 3e-3),
    ("all", 0.5, 3e-3),
    ("routers,norms", 0.0, 3e-3),
    ("all", 1.0, 1e-3),
    ("all", 1.0, 1e-2),
)


def perplexities(folder: Path, tokens: int) -> dict[str, float]:
    """Perplexity in and out of domain."""
    found = {}
    for domain, text in HELD_OUT.items():
        request = EvaluateRequest(model=folder, text=str(text), tokens=tokens)
        found[domain] = round(evaluate(request).results[0].perplexity, 4)
    return found


def rows_of(
    model: str, size: str, work: Path, tokens: int, known: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The dense, the compressed, and every healed checkpoint, but for what is known.

    Args:
        model: Name of the model.
        size: Name of the size.
        work: Where checkpoints are written.
        tokens: To train on.
        known: Rows that were found before.
    """
    dense = MODELS[model]
    if not known:
        yield {"what": "dense", **perplexities(dense, 32768)}
    out = work / f"{model}-{size}".replace(" ", "")
    if not (out / MANIFEST).exists():
        calibration = {"texts": [DATA], "tokens": 32768, "refine": 100}
        decompose(DecomposeRequest(model=dense, output=out, calibration=calibration, **SIZES[size]))
    if len(known) < 2:
        yield {"what": "compressed", **perplexities(out, 32768)}
    done = {(row["what"], row.get("kl_share"), row.get("learning_rate")) for row in known}
    cores = "quantize" in SIZES[size]
    for parts, share, rate in CHOICES:
        if parts == ("factors" if SIZES[size]["keep"] == 1 else "scales" if not cores else None):
            continue  # there are none
        if (parts, share, rate) in done:
            continue
        healed = work / "healed"
        started = time.monotonic()
        report = heal(
            HealRequest(
                folder=out,
                data=DATA,
                output=healed,
                train=None if parts == "all" else parts,
                teacher=dense if share else None,
                teacher_share=share or 0.5,
                tokens=tokens,
                batch=8,
                at_once=8,
                learning_rate=rate,
                overwrite=True,
            )
        )
        yield {
            "what": parts,
            "kl_share": share,
            "learning_rate": rate,
            "parameters": report.parameters,
            "tokens": report.tokens,
            "seconds": round(time.monotonic() - started, 1),
            **perplexities(healed, 32768),
        }


def table() -> str:
    """All rows that were found, as Markdown."""
    lines = [
        "| model | size | trained | loss | rate | tokens | seconds | in domain | out of domain |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for path in sorted(RESULTS.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        first = rows[0]
        for row in rows:
            ratios = " | ".join(f"{row[d]:.2f} (x {row[d] / first[d]:.4f})" for d in HELD_OUT)
            share = row.get("kl_share")
            loss = "" if share is None else {0.0: "text", 1.0: "KL"}.get(share, "both")
            cells = (row["model"], row["size"], row["what"], loss, row.get("learning_rate", ""))
            counts = (row.get("tokens", ""), row.get("seconds", ""))
            lines.append(f"| {' | '.join(map(str, (*cells, *counts)))} | {ratios} |")
    return "\n".join(lines)


def main() -> None:
    """Add the rows of a model and a size that are missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--size", choices=SIZES, default="w4")
    parser.add_argument("--tokens", type=int, default=204800, help="to train on")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "heal", help="checkpoints")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.model is None:
        print(table())
        return
    options.results.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    path = options.results / f"{options.model}-{options.size}.jsonl".replace(" ", "")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    known = [json.loads(line) for line in lines]
    with path.open("a", encoding="utf-8") as file:
        for row in rows_of(options.model, options.size, options.work, options.tokens, known):
            line = json.dumps({"model": options.model, "size": options.size, **row})
            file.write(line + "\n")
            file.flush()
            print(line, flush=True)


if __name__ == "__main__":
    main()

"""Perplexity of dense, compressed and healed models, for each choice of what is trained.

Every model is calibrated and healed on the same Python text and measured on held-out Python (in
domain) and English (out of domain). Rows are kept: a run that was stopped goes on.

    python -m benchmarks.heal --model fine --size w4      # minutes
    python -m benchmarks.heal                             # prints the tables
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
from tuckerize.domain import Part
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.healing.setup import parts_of_all

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "heal"
TEXTS = ROOT / "benchmarks" / "quality" / "trained"
MODELS = {
    "tiny-moe": ROOT / "examples" / "tiny-moe",
    "fine": TEXTS / "fine",
    "large": TEXTS / "large",
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
RATE = 1e-3
WINDOW, BATCH = 256, 4
# What is trained and the share of the KL divergence in the loss; the best known come first.
CHOICES = (
    ("cores,factors,scales", 1.0),
    ("cores,factors,scales", 0.0),
    ("all", 1.0),
    ("routers,norms", 1.0),
    ("all", 0.0),
    ("all", 0.5),
    ("cores", 1.0),
    ("scales", 1.0),
    ("factors", 1.0),
    ("routers,norms", 0.0),
)


def perplexities(folder: Path, tokens: int) -> dict[str, float]:
    """Perplexity in and out of domain."""
    found = {}
    for domain, text in HELD_OUT.items():
        request = EvaluateRequest(model=folder, text=str(text), tokens=tokens)
        found[domain] = round(evaluate(request).results[0].perplexity, 4)
    return found


def rows_of(
    model: str, size: str, work: Path, tokens: int, choices: int, known: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The dense, the compressed, and every healed checkpoint, but for what is known.

    Args:
        model: Name of the model.
        size: Name of the size.
        work: Where checkpoints are written.
        tokens: To train on.
        choices: How many of the choices are measured.
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
    done = {(row["what"], row.get("kl_share")) for row in known}
    there = {*parts_of_all(TuckerCheckpoint.open(out)).values()}
    for parts, share in CHOICES[:choices]:
        names = tuple(Part) if parts == "all" else tuple(map(Part.parse, parts.split(",")))
        trained = [part for part in names if part in there]
        if not trained or (parts, share) in done:
            continue
        healed = work / f"{out.name}-healed"
        started = time.monotonic()
        report = heal(
            HealRequest(
                folder=out,
                data=DATA,
                output=healed,
                train=",".join(trained),
                teacher=dense if share else None,
                teacher_share=share or 0.5,
                tokens=tokens,
                window=WINDOW,
                batch=BATCH,
                learning_rate=RATE,
                overwrite=True,
            )
        )
        yield {
            "what": parts,
            "kl_share": share,
            "learning_rate": RATE,
            "parameters": report.parameters,
            "steps": report.steps,
            "tokens": report.tokens,
            "seconds": round(time.monotonic() - started, 1),
            **perplexities(healed, 32768),
        }


def measured() -> dict[str, list[dict[str, Any]]]:
    """Rows by file; the first is that of the dense model."""
    return {
        path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted(RESULTS.glob("*.jsonl"))
    }


def ratios(row: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    """Perplexities over those of the dense model."""
    return [f"{row[domain] / dense[domain]:.4f}" for domain in HELD_OUT]


def overview() -> str:
    """Best known choices, as Markdown: Python / English."""
    chosen = [("compressed", None), *CHOICES[:4], ("all", 0.5)]
    heads = [f"{what.replace('cores,factors,scales', 'default')}{_loss(s)}" for what, s in chosen]
    lines = [f"| model | size | {' | '.join(heads)} |", "| --- " * (len(heads) + 2) + "|"]
    for dense, *rows in measured().values():
        known = {(row["what"], row.get("kl_share")): row for row in rows}
        cells = [
            " / ".join(ratios(known[choice], dense)) if choice in known else "" for choice in chosen
        ]
        lines.append(f"| {' | '.join([dense['model'], dense['size'], *cells])} |")
    return "\n".join(lines)


def table() -> str:
    """All rows as Markdown, with tokens in all and before the state that was kept."""
    heads = ("model", "size", "trained, loss", "tokens", "kept after", "seconds", *HELD_OUT)
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for dense, *rows in measured().values():
        for row in rows:
            what = row["what"].replace(",", ", ") + _loss(row.get("kl_share"))
            counts = ("", "", "")
            if "steps" in row:
                tokens = row["steps"] * BATCH * (WINDOW - 1)
                counts = (f"{tokens:,}", f"{row['tokens']:,}", f"{row['seconds']:.0f}")
            cells = (row["model"], row["size"], what, *counts, *ratios(row, dense))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _loss(share: float | None) -> str:
    return "" if share is None else {0.0: ", text", 1.0: ", KL"}.get(share, ", both")


def main() -> None:
    """Add the rows of a model and a size that are missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--size", choices=SIZES, default="w4")
    parser.add_argument("--tokens", type=int, default=20480, help="to train on")
    parser.add_argument("--choices", type=int, default=len(CHOICES), help="the first so many")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "heal", help="checkpoints")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.model is None:
        print(overview(), table(), sep="\n\n")
        return
    options.results.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    path = options.results / f"{options.model}-{options.size}.jsonl".replace(" ", "")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    known = [json.loads(line) for line in lines]
    with path.open("a", encoding="utf-8") as file:
        for row in rows_of(
            options.model, options.size, options.work, options.tokens, options.choices, known
        ):
            line = json.dumps({"model": options.model, "size": options.size, **row})
            file.write(line + "\n")
            file.flush()
            print(line, flush=True)


if __name__ == "__main__":
    main()

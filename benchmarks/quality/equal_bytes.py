"""Structure, quantisation and both at equal bytes: what the prediction loses at each size.

    python -m benchmarks.quality.equal_bytes --models FOLDER       # what is missing, row by row
    python -m benchmarks.quality.equal_bytes --table
    python -m benchmarks.quality.equal_bytes --plot equal_bytes.png

The x-axis is bits per routed weight of the dense model, every code, scale, zero point and factor
counted. A row is appended to the results as soon as it is made, and not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import quantised, tucker_rows
from benchmarks.quality.divergence import Prediction, divergence, predict
from benchmarks.quality.encodings import LEARNED, Encoding
from benchmarks.quality.equal_bytes_tables import plot, tables
from benchmarks.quality.layer import Compressed, Layer, dense
from benchmarks.quality.methods.pruning import equally_eliminated_neurons
from benchmarks.quality.models import MoeModel
from benchmarks.quality.quantised import QTIP
from benchmarks.quality.registry import METHODS
from benchmarks.quality.trellis import Trellis
from tuckerize import DecomposeRequest

RESULTS = Path(__file__).parents[1] / "results" / "equal_bytes.jsonl"
CALIBRATION_TOKENS = 65536  # half of ours are random
TEXT_TOKENS = 32768  # of the calibration that matrices are rounded for
TEST_TOKENS = {"in_domain": 40960, "out_of_domain": 20480}
DENSE = "dense"
OURS = "tuckerize"
EQUAL_WIDTHS = "neuron elimination, equal widths"
CORES = "tuckerize, rounded afterwards"
FACTORS = "factors of"
"""Rounding of structures with a nonlinearity: bases to nearest, then A by GPTQ, data-free."""


@dataclass(frozen=True)
class Wanted:
    """A row to make.

    Attributes:
        structure: A method of the registry, `dense` for quantisation alone, `tuckerize`, or `CORES`
            for what it gives in 16 bits.
        keep: Kept share of the parameters.
        rounding: RTN, GPTQ, learned, QTIP, our own, or `FACTORS`.
        encoding: How the matrices are stored; for our own rows `w8`, `w4`, `w3-g128` or `--bits 4`,
            and options.
        target: Target of our own rows.
    """

    structure: str
    keep: float
    rounding: str
    encoding: str
    target: str = ""


TRELLISES = {str(encoding): encoding for encoding in map(Trellis, (4, 3, 2))}
ENCODINGS = {
    str(encoding): encoding
    for bits in (8, 6, 5, 4, 3, 2)
    for group in (32, 64, 128, None)
    for zero in (False, True)
    for encoding in [Encoding(bits, group, zero)]
}
STRUCTURES = {**METHODS, EQUAL_WIDTHS: equally_eliminated_neurons}
KEEPS = (0.9, 0.8, 0.65, 0.5)
PRUNED = {
    "neuron elimination": KEEPS,
    "REAP": (0.875, 0.75, 0.625, 0.5),  # of 8 or 16 experts equally many in every layer
    EQUAL_WIDTHS: (*KEEPS, 0.67),  # 64 of 96 neurons are whole groups
    "MoE-Slimming": KEEPS,
    "PARSER": KEEPS,
    "SLBF": KEEPS,
    "MoBE": KEEPS,
}


def _alone(rounding: str, *bits: int, groups: Sequence[int] = (32,)) -> list[Wanted]:
    return [
        Wanted(DENSE, 1, rounding, str(Encoding(b, group, zero)))
        for b in bits
        for group in groups
        for zero in (False, True)
    ]


def _pruned(*structures: str, bits: int = 4) -> list[Wanted]:
    encoding = str(Encoding(bits, 32, zero=bits < 4))
    return [Wanted(s, keep, "GPTQ", encoding) for s in structures for keep in PRUNED[s]]


def _factored(*structures: str) -> list[Wanted]:
    encoding = str(Encoding(4, 32, zero=False))
    return [Wanted(s, keep, FACTORS, encoding) for s in structures for keep in PRUNED[s]]


def _ours(quantize: str, *keeps: float, target: str = "free") -> list[Wanted]:
    return [Wanted(OURS, keep, "own", quantize, target) for keep in keeps]


WANTED = (
    *_alone("GPTQ", 4, 3, 2),
    *_ours("w4", *KEEPS),
    *_ours("w3", *KEEPS),
    *_ours(f"w3{tucker_rows.RANDOM}0.2", *KEEPS),
    *_ours(f"w3{tucker_rows.RANDOM}0", 0.9),
    *(Wanted(OURS, 1, "own", f"{tucker_rows.BITS}{bits}", "free") for bits in (6, 5, 4.05, 3.6)),
    *(Wanted(OURS, 1, "own", f"{tucker_rows.BITS}{bits}", "fused-kernels") for bits in (7, 6, 5)),
    *(Wanted(DENSE, 1, LEARNED, str(Encoding(bits, 32, zero=True))) for bits in (2, 3, 4)),
    *_pruned("neuron elimination", "REAP", "MoE-Slimming", "PARSER"),
    Wanted(DENSE, 1, "GPTQ", str(Encoding(8, None, zero=False))),
    *_ours("w3-g128", 0.9, 0.8, 0.65, 0.5),
    *_ours("w4-g128", 0.9, 0.8),
    *_ours("w4", 0.8, 0.5, 0.65, 0.9, target="fused-kernels"),
    *_ours("w8", 0.9, 0.75, 0.65, 0.5),
    *_ours("w4", 0.8, 0.5, target="any-engine"),
    *_ours("w3", 0.8, 0.65, target="any-engine"),
    *_pruned(EQUAL_WIDTHS),
    *_alone("GPTQ", 3, 2, 4, groups=(128,)),
    *_alone("GPTQ", 6, 5),
    *_ours("w4", 1),
    *_ours("w8", 0.75, target="fused-kernels"),
    *_ours("w8", 0.75, target="any-engine"),
    *_factored("SLBF", "MoBE"),
    *(Wanted(DENSE, 1, QTIP, trellis) for trellis in TRELLISES),
    *(Wanted(CORES, keep, QTIP, str(Trellis(3))) for keep in KEEPS),
    *_pruned("neuron elimination", "REAP", bits=3),
    *_pruned("neuron elimination", "REAP", bits=8),
    *_alone("RTN", 4, 3, 2),
    *_alone("GPTQ", 8, 6, 5, 4, 3, 2, groups=(32, 64, 128)),
    *_alone("RTN", 8, 6, 5, 4, 3, 2, groups=(32, 64, 128)),
)
"""All rows, the most telling first."""


class Bench:
    """One model and what it makes of the texts when it is dense."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.model = MoeModel(folder / name)
        self.text = folder / "python_calibration.txt"
        self.calibration = self.model.tokens(self.text.read_text("utf-8"), CALIBRATION_TOKENS)
        held_out = {
            kind: folder / f"{text}_held_out.txt"
            for kind, text in (("in_domain", "python"), ("out_of_domain", "english"))
        }
        self.tests = {
            kind: self.model.tokens(file.read_text("utf-8"), TEST_TOKENS[kind])
            for kind, file in held_out.items()
            if file.exists()
        }
        self.dense: dict[str, Prediction] = {
            kind: predict(self.model, tokens) for kind, tokens in self.tests.items()
        }
        self._structures: dict[tuple[str, float], list[Compressed]] = {}

    @cached_property
    def layers(self) -> list[Layer]:
        """The MoE layers with the calibration tokens, dense."""
        self.model.restore()
        return self.model.layers(self.calibration)

    @cached_property
    def weights(self) -> int:
        """Number of routed weights."""
        return sum(layer.dense for layer in self.layers)

    def row(self, row: Wanted) -> dict[str, Any]:
        """Make a row."""
        start = time.monotonic()
        if row.structure == OURS:
            asked = self._asked(row.keep, row.encoding, row.target)
            model, bits, manifest = tucker_rows.decomposed(asked)
            costs = tucker_rows.costs(self.layers, manifest)
        elif row.structure == CORES:
            model = self.model
            compressed, manifest = tucker_rows.unrounded(self._asked(row.keep, None, "free"))
            costs = tucker_rows.costs(self.layers, manifest)
            bits = self._stored(compressed, row) / self.weights
        else:
            model = self.model
            compressed = self._structure(row.structure, row.keep)
            costs = quantised.costs(self.layers, compressed)
            bits = self._stored(compressed, row) / self.weights
        seconds = time.monotonic() - start
        measured = {
            kind: divergence(model, tokens, self.dense[kind]) for kind, tokens in self.tests.items()
        }
        self.model.restore()
        return {
            "model": self.name,
            **asdict(row),
            "bits": bits,
            **asdict(costs),
            "seconds": round(seconds, 1),
            **measured,
        }

    def _asked(self, keep: float, encoding: str | None, target: str) -> DecomposeRequest:
        return tucker_rows.request(
            self.folder / self.name,
            self.text,
            CALIBRATION_TOKENS,
            keep=keep,
            encoding=encoding,
            target=target,
        )

    def _stored(self, compressed: Sequence[Compressed], row: Wanted) -> int:
        """Put compressed experts into the model as a row stores them: the bits that they take."""
        tokens = self.calibration[: TEXT_TOKENS + 1]
        if row.rounding == QTIP:
            trellis = TRELLISES[row.encoding]
            return quantised.quantise(self.model, compressed, tokens, trellis, row.rounding)
        encoding = ENCODINGS[row.encoding]
        if row.rounding == FACTORS:
            roundings = [own.rounded for own in compressed if own.rounded is not None]
            if len(roundings) < len(compressed):
                raise ValueError(f"{row.structure} does not say how its factors are rounded")
            found = [rounded(encoding) for rounded in roundings]
            self.model.replace([Compressed(stacks, ()) for stacks, _ in found])
            return sum(bits for _, bits in found)
        return quantised.quantise(self.model, compressed, tokens, encoding, row.rounding)

    def _structure(self, name: str, keep: float) -> list[Compressed]:
        if name == DENSE:
            return [dense(layer) for layer in self.layers]
        if (name, keep) not in self._structures:
            self.model.restore()
            self._structures = {(name, keep): STRUCTURES[name](self.layers, keep)}
        return self._structures[name, keep]


def main() -> None:
    """Make what is missing, or print or plot what is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="folder with the models and the texts")
    parser.add_argument("--only-models", nargs="+", help="names of the models to take")
    parser.add_argument("--only", nargs="+", help="structures to take")
    parser.add_argument("--only-rounding", nargs="+", help="ways of rounding to take")
    parser.add_argument("--first", type=int, help="take so many rows of the list")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no row later")
    parser.add_argument("--table", action="store_true", help="print the tables")
    parser.add_argument("--plot", type=Path, help="draw the curves to this PNG (matplotlib)")
    options = parser.parse_args()
    if options.models is not None:
        _make(options)
    if options.table:
        print(tables(read(options.results)))
    if options.plot is not None:
        plot(read(options.results), options.plot)


def read(file: Path) -> list[dict[str, Any]]:
    """The rows that are there."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def _make(options: argparse.Namespace) -> None:
    started = time.monotonic()
    for config in sorted(options.models.glob("*/config.json")):
        name = config.parent.name
        if options.only_models and name not in options.only_models:
            continue
        digest = hashlib.sha256((config.parent / "model.safetensors").read_bytes()).hexdigest()
        there = {
            Wanted(*(row[key] for key in Wanted.__dataclass_fields__))
            for row in read(options.results)
            if (row["model"], row["sha256"]) == (name, digest[:16])
        }
        missing = [
            row
            for row in list(dict.fromkeys(WANTED))[: options.first]
            if row not in there
            and (not options.only or row.structure in options.only)
            and (not options.only_rounding or row.rounding in options.only_rounding)
        ]
        bench: Bench | None = None
        for row in missing:
            if time.monotonic() - started > 60 * options.minutes:
                return
            bench = bench or Bench(options.models, name)
            made = {"sha256": digest[:16], **bench.row(row)}
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(made) + "\n")
            print(f"{name} {row}: {made['bits']:.3f} {made['in_domain']['ratio']:.4f}", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()

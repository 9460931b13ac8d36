"""Every method on every model at equal stored numbers: perplexity, output error, time, memory.

    python -m benchmarks.quality.run --models FOLDER --write
    python -m benchmarks.quality.run --table
    python -m benchmarks.quality.run --plot quality.png

FOLDER holds the models, a folder each, and the texts: `python_calibration.txt`,
`python_held_out.txt` (in domain) and, where there is one, `english_held_out.txt` (out of domain).
With `--write` every row goes to the results at once, and rows that are there are not made again.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.layer import Compressed, Layer, triple
from benchmarks.quality.models import MoeModel
from benchmarks.quality.registry import METHODS, NEED_SENSITIVITY, OTHER_TEXT, OURS, TEXT
from benchmarks.quality.tables import plot, tables

RESULTS = Path(__file__).parents[1] / "results" / "quality.json"
KEEPS = (0.85, 0.75, 0.6, 0.5, 0.4)
OUTPUT_TOKENS = 8192  # on which the layers' output errors are measured


@dataclass(frozen=True)
class Row:
    """What one method made of one model.

    Attributes:
        model: Name of the model's folder.
        method: Name of the method.
        keep: Share of the routed experts' numbers that may be stored.
        stored: Numbers stored, over the dense ones.
        in_domain: Perplexity on held-out text like the calibration's, over the dense model's.
        out_of_domain: The same on text of another kind.
        output_errors: Relative error of every layer's routed output on held-out tokens.
        seconds: Of compression alone; statistics of the calibration text are the model's.
        peak_mib: Memory that compression took beyond what was there before it, or, for a command,
            the peak of its process.
    """

    model: str
    method: str
    keep: float
    stored: float
    in_domain: float
    out_of_domain: float | None
    output_errors: list[float]
    seconds: float
    peak_mib: float


class Bench:
    """One model, its texts and what the dense model makes of them."""

    def __init__(self, folder: Path, name: str, calibration_tokens: int, test_tokens: int) -> None:
        self.path = folder / name
        self.name = name
        self.calibration_file = folder / "python_calibration.txt"
        self.calibration_tokens = calibration_tokens
        self.model = MoeModel(self.path)
        self.tests: list[Tensor | None] = []
        for kind in ("python", "english"):
            file = folder / f"{kind}_held_out.txt"
            text = file.read_text(encoding="utf-8") if file.exists() else ""
            self.tests.append(self.model.tokens(text, test_tokens) if text else None)
        self.dense_perplexities = self._perplexities(self.model)
        test = self.tests[0]
        if test is None:
            raise SystemExit(f"{folder} has no python_held_out.txt")
        self.test_layers = self.model.layers(test[: OUTPUT_TOKENS + 1])
        self.test_outputs = self.model.outputs(self.test_layers)
        self.seconds: dict[str, float] = {}

    @cached_property
    def _calibration(self) -> Tensor:
        text = self.calibration_file.read_text(encoding="utf-8")
        return self.model.tokens(text, self.calibration_tokens)

    @cached_property
    def layers(self) -> list[Layer]:
        """The MoE layers with the calibration tokens."""
        start = time.monotonic()
        layers = self.model.layers(self._calibration)
        self.seconds["calibration"] = round(time.monotonic() - start, 1)
        return layers

    @cached_property
    def layers_with_sensitivity(self) -> list[Layer]:
        """The same with derivatives of the loss."""
        layers, start = self.layers, time.monotonic()
        slopes = self.model.sensitivities(self._calibration)
        self.seconds["sensitivity"] = round(time.monotonic() - start, 1)
        return [replace(layer, sensitivity=s) for layer, s in zip(layers, slopes, strict=True)]

    def header(self) -> dict[str, Any]:
        """What the table says of the model itself."""
        experts, intermediate, hidden = self.test_layers[0].shape
        self.model.replace([_silent(layer) for layer in self.test_layers])
        silent = self._perplexities(self.model)
        self.model.restore()
        return {
            "sha256": weights_hash(self.path),
            "experts": experts,
            "intermediate": intermediate,
            "hidden": hidden,
            "top_k": self.test_layers[0].experts_Tk.shape[-1],
            "moe_layers": len(self.test_layers),
            "calibration_limit": self.calibration_tokens,
            "calibration_tokens": len(self._calibration) - 1,
            "test_tokens": [None if t is None else len(t) - 1 for t in self.tests],
            "perplexity": self.dense_perplexities,
            "without_routed_experts": silent,
        }

    def _perplexities(self, model: MoeModel) -> list[float | None]:
        return [None if test is None else model.perplexity(test) for test in self.tests]

    def measure(
        self, model: MoeModel, method: str, keep: float, stored: int, cost: tuple[float, float]
    ) -> Row:
        """Perplexities and output errors of a model whose experts are replaced."""
        relative = [
            None if now is None or before is None else now / before
            for now, before in zip(self._perplexities(model), self.dense_perplexities, strict=True)
        ]
        errors = [
            float((now - before).norm() / before.norm())
            for now, before in zip(model.outputs(self.test_layers), self.test_outputs, strict=True)
        ]
        share = stored / sum(layer.dense for layer in self.test_layers)
        if share > keep:
            raise SystemExit(f"{method} stores {share:.4f} of {self.name}, more than {keep}")
        seconds, peak = round(cost[0], 2), round(cost[1])
        in_domain = relative[0] or 0.0
        return Row(self.name, method, keep, share, in_domain, relative[1], errors, seconds, peak)

    def competitor(self, method: str, keep: float) -> Row:
        """One of the methods of this benchmark."""
        collected = self.layers_with_sensitivity if method in NEED_SENSITIVITY else self.layers
        layers = [replace(layer) for layer in collected]  # without moments that others computed
        before, start = _peak_mib(reset=True), time.monotonic()
        compressed = METHODS[method](layers, keep)
        cost = time.monotonic() - start, _peak_mib() - before
        self.model.replace(compressed)
        row = self.measure(self.model, method, keep, sum(c.stored for c in compressed), cost)
        self.model.restore()
        return row

    def ours(self, method: str, keep: float) -> Row | None:
        """The command line of this project; None where it does not know the options."""
        texts = {
            TEXT: str(self.calibration_file),
            OTHER_TEXT: str(self.calibration_file.with_name("english_calibration.txt")),
        }
        recipe = {"rules": [{"keep": keep}], **OURS[method]}
        if settings := recipe.get("calibration"):
            own = {"texts": [texts[text] for text in settings["texts"]]}
            recipe["calibration"] = {"tokens": self.calibration_tokens, **settings, **own}
        with tempfile.TemporaryDirectory(prefix="quality-") as temporary:
            small, dense = f"{temporary}/small", f"{temporary}/dense"
            file = Path(temporary, "recipe.yaml")
            file.write_text(json.dumps(recipe), encoding="utf-8")  # which is YAML
            source = ["--model", str(self.path), "--recipe", str(file), "--output", small]
            cost = _run(["decompose", *source])
            if cost is None or _run(["reconstruct", small, "--output", dense]) is None:
                return None
            manifest = json.loads((Path(small) / "tuckerize.json").read_text(encoding="utf-8"))
            stored = manifest["after"]["routed_parameters"]
            return self.measure(MoeModel(Path(dense)), method, keep, stored, cost)


def main() -> None:
    """Run what is missing, or print or plot what is there."""
    options = _options()
    results = _read(options.results)
    if options.models is not None:
        _run_all(options, results)
    if options.table or options.models is not None:
        print(tables(results))
    if options.plot is not None:
        plot(results, options.plot)


def _run_all(options: argparse.Namespace, results: dict[str, Any]) -> None:
    names = sorted(path.parent.name for path in options.models.glob("*/config.json"))
    for name in names:
        if options.only_models and name not in options.only_models:
            continue
        known = results["models"].get(name, {})
        settings = weights_hash(options.models / name), options.calibration_tokens
        if (known.get("sha256"), known.get("calibration_limit")) != settings:
            results["rows"] = [row for row in results["rows"] if row["model"] != name]
        wanted = _wanted(options, results, name)
        if not wanted:
            continue
        bench = Bench(options.models, name, options.calibration_tokens, options.test_tokens)
        results["models"][name] = bench.header()
        for method, keep in wanted:
            row = bench.ours(method, keep) if method in OURS else bench.competitor(method, keep)
            if row is None:
                continue
            print(f"{name} {method} {keep}: {row.in_domain:.4f} {row.out_of_domain}", flush=True)
            key = (name, method, keep)
            rows = [r for r in results["rows"] if (r["model"], r["method"], r["keep"]) != key]
            results["rows"] = [*rows, asdict(row)]
            results["models"][name]["seconds"] = bench.seconds
            if options.write:
                options.results.parent.mkdir(exist_ok=True)
                options.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _wanted(
    options: argparse.Namespace, results: dict[str, Any], name: str
) -> list[tuple[str, float]]:
    there = {(r["method"], r["keep"]) for r in results["rows"] if r["model"] == name}
    methods = options.only or [*METHODS, *OURS]
    return [
        (method, keep)
        for method in methods
        for keep in options.keep
        if options.again or (method, keep) not in there
    ]


def weights_hash(folder: Path) -> str:
    """SHA-256 of a model's weight files."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _silent(layer: Layer) -> Compressed:
    return Compressed(triple(torch.zeros_like(stack) for stack in layer.stacks), ())


def _peak_mib(*, reset: bool = False) -> float:
    """Peak resident memory of this process since the last reset (Linux), MiB."""
    if reset:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line) / 1024


def _run(words: list[str]) -> tuple[float, float] | None:
    """Run a command of this project: seconds and its peak memory in MiB, or None if it failed."""
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "tuckerize", *words], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        print(f"failed: tuckerize {' '.join(words)}", file=sys.stderr)
        return None
    return time.monotonic() - start, usage.ru_maxrss / 1024


def _read(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {"models": {}, "rows": []}
    read: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return read


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="folder with the models and the texts")
    parser.add_argument("--only-models", nargs="+", help="names of the models to take")
    parser.add_argument("--only", nargs="+", choices=[*METHODS, *OURS], help="methods to take")
    parser.add_argument("--keep", type=float, nargs="+", default=KEEPS)
    parser.add_argument("--calibration-tokens", type=int, default=65536)
    parser.add_argument("--test-tokens", type=int, default=40960, help="of each text")
    parser.add_argument("--again", action="store_true", help="make rows that are there again")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="write the results row by row")
    parser.add_argument("--table", action="store_true", help="print the tables")
    parser.add_argument("--plot", type=Path, help="draw the curves to this PNG (matplotlib)")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Every layout on every mesh, checked: the tables of benchmarks/results/parallelism.md.

Runs the cases of tests/distributed/layer_cases.py under torchrun, and `verify` on the shipped
model, sharded for every mesh, on the CPU and on the stand-in NPU of tests/npu. With `--write` it
replaces the tables of the document.

    python -m benchmarks.parallelism --write
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from tests.npu.installing import STANDIN, installed

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "benchmarks" / "results" / "parallelism.md"
CASES = ROOT / "tests" / "distributed" / "layer_cases.py"
MODEL = ROOT / "examples" / "tiny-moe"

# Processes, and the meshes tp x ep x cp of them.
MESHES = {
    2: ["2x1x1", "1x2x1", "1x1x2"],
    4: ["4x1x1", "1x4x1", "2x2x1", "2x1x2"],
    8: ["8x1x1", "2x2x2"],
}


def run(*words: str | Path) -> str:
    """Run a module; returns its standard output."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    ).stdout


def torchrun(processes: int, *words: str | Path) -> str:
    """Run a script or module under torchrun; returns its standard output."""
    options = ("--standalone", "--nproc-per-node", str(processes))
    return run("torch.distributed.run", *options, *words)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def layer_table() -> str:
    """Largest errors of all cases, by mesh, layout, and the way of the tokens."""
    found: dict[tuple[str, ...], list[dict[str, float]]] = defaultdict(list)
    for processes, meshes in MESHES.items():
        for case in json.loads(torchrun(processes, CASES, *meshes)):
            over_tp = "own tokens" if case["sequence_parallel"] else "same tokens"
            tp, ep, _ = case["mesh"].split("x")
            key = (
                case["mesh"].replace("x", " x "),
                case["layout"],
                over_tp if tp != "1" else "-",
                ("all-to-all" if case["all_to_all"] else "all-gather") if ep != "1" else "-",
            )
            found[key].append(case["errors"])
    rows = [
        (
            *key,
            str(len(errors)),
            *(f"{max(e[what] for e in errors):.0e}" for what in ("output", "gradients", "traffic")),
        )
        for key, errors in found.items()
    ]
    header = ("mesh", "layout", "over tp", "over ep", "cases", "output", "gradients", "traffic")
    return table(header, rows)


def verify_table() -> str:
    """What `verify` reports of the shipped model on every mesh."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        # Processes have NPUs from now on; fallbacks to the CPU are errors.
        os.environ["PYTHONPATH"] = installed(Path(folder), package=STANDIN)
        os.environ["TORCH_NPU_FALLBACK_CPU_DISABLE"] = "1"
        out = Path(folder) / "out"
        size = ("--keep", "0.75", "--joint", "gate_up")
        run("tuckerize", "decompose", "--model", MODEL, *size, "--output", out)
        for processes, meshes in MESHES.items():
            for mesh in meshes:
                tp, ep, cp = mesh.split("x")
                sizes = ("--tp", tp, "--ep", ep)
                run("tuckerize", "shard", out, *sizes, "--overwrite")
                command = ("-m", "tuckerize", "verify", out, *sizes, "--cp", cp, "--json")
                for option in [(), ("--sequence-parallel",)][: 1 + (tp != "1")]:
                    for device in ("cpu", "npu"):
                        own = ("--device", device)
                        report = json.loads(torchrun(processes, *command, *option, *own))
                        options = " ".join((*sizes, "--cp", cp, *option))
                        rows.append((options, device, *verdict(report)))
    header = ("options", "device", "layout", "sharded vs unsharded", "sent", "predicted", "dense")
    return table((*header, ""), rows)


def verdict(report: dict[str, Any]) -> tuple[str, ...]:
    """Cells of one report: bytes are of all kinds of collectives."""
    totals = (
        f"{sum(entry[name] for entry in report['traffic']):.0f}"
        for name in ("counted", "predicted", "dense")
    )
    error = max(layer["sharding_error"] for layer in report["layers"])
    return (report["layout"], f"{error:.1e}", *totals, "passed" if report["passed"] else "failed")


def replace_between(text: str, name: str, content: str) -> str:
    """A document with new text between the markers of a table."""
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}{content}{end}{after}"


TABLES = {"layers": layer_table, "verify": verify_table}


def main() -> None:
    """Run everything and print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the tables of the document")
    parser.add_argument("--only", choices=TABLES, help="one of the tables")
    options = parser.parse_args()
    for name, make in TABLES.items():
        if options.only in (None, name):
            content = make()
            print(content)
            if options.write:
                DOCUMENT.write_text(replace_between(DOCUMENT.read_text(), name, content))


if __name__ == "__main__":
    main()

"""Time of a calibrated decomposition now and at an earlier commit, in one run on one machine.

A generated layer with DeepSeek-V2-Lite's experts (64 of 1408 x 2048, top-6), widths divided by
`--narrow`; 8,192 tokens, one thread. Processor time, which other work on the machine changes less
than the wall's.

    python -m benchmarks.calibrated_speed --baseline v0.1.0 --write
    python -m benchmarks.calibrated_speed --baseline v0.1.0 --narrow 1 --only-plan --write
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.full_width import CALIBRATION_TOKENS, EXAMPLE, lite_config, write_checkpoint

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "calibrated_speed.json"
STEPS = 40
# Most steps by default, and a program that prints how many of them a version makes.
MOST_STEPS = 300
STEPS_MADE = f"""
from tuckerize.calibration import refine
tokens = {CALIBRATION_TOKENS} * 15 // 16
known = hasattr(refine, "batch_and_steps")
print(refine.batch_and_steps(tokens, {MOST_STEPS})[1] if known else {MOST_STEPS})
"""


@dataclass(frozen=True)
class Times:
    """Processor seconds of one version, of a layer.

    Attributes:
        plan: `tuckerize plan`.
        closed_form: `tuckerize decompose --rank full,full,75% --refine 0`.
        refinement_step: One step of refinement.
        steps: Steps that `--refine 300` makes.
        peak_gib: Peak resident memory of `plan`.
    """

    plan: float
    closed_form: float | None = None
    refinement_step: float | None = None
    steps: int | None = None
    peak_gib: float | None = None


@contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """The tree of a commit in a folder."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def seconds(tree: Path, words: list[str], cache: Path) -> tuple[float, float]:
    """Processor seconds of a command of a version, and its peak resident memory, GiB.

    The seconds do not count who else runs.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "XDG_CACHE_HOME": str(cache),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "tuckerize", *words],
        cwd=tree,  # `python -m` looks there first
        env=environment,
        stdout=sys.stderr,
    )
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(words)} ended with {os.waitstatus_to_exitcode(status)}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20


def measure(tree: Path, model: Path, folder: Path, *, only_plan: bool) -> Times:
    """Times of one version."""
    folder.mkdir()
    cache, output = folder / "cache", folder / "out"
    options = ["--model", str(model), "--calibration", str(EXAMPLE / "held_out.txt")]
    options += ["--calibration-tokens", str(CALIBRATION_TOKENS)]
    plan, peak = seconds(tree, ["plan", *options], cache)
    if only_plan:
        return Times(round(plan, 1), peak_gib=round(peak, 2))
    decompose = ["decompose", *options, "--output", str(output), "--rank", "full,full,75%"]
    decompose += ["--overwrite"]
    closed, _ = seconds(tree, [*decompose, "--refine", "0"], cache)
    refined, _ = seconds(tree, [*decompose, "--refine", str(STEPS)], cache)
    made = subprocess.run(
        [sys.executable, "-c", STEPS_MADE], check=True, cwd=tree, stdout=subprocess.PIPE
    )
    step = round((refined - closed) / STEPS, 2)
    return Times(round(plan, 1), round(closed, 1), step, int(made.stdout), round(peak, 2))


def read() -> list[dict[str, Any]]:
    """The results that are there, one for each width."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def main() -> None:
    """Measure both versions, print them, and write the results if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--baseline", required=True, help="commit to compare with")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--narrow", type=int, default=2)
    parser.add_argument("--only-plan", action="store_true", help="measure `plan` alone")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="speed-") as temporary:
        folder = Path(temporary)
        config = lite_config(2, dense_layers=1, narrow=arguments.narrow)
        write_checkpoint(folder / "model", config)
        now = measure(ROOT, folder / "model", folder / "now", only_plan=arguments.only_plan)
        print(f"now      {now}", flush=True)
        with checked_out(arguments.baseline, folder / "tree") as tree:
            before = measure(
                tree, folder / "model", folder / "before", only_plan=arguments.only_plan
            )
    print(f"before   {before}")
    if arguments.write:
        result = {
            "command": " ".join(["python", "-m", "benchmarks.calibrated_speed", *sys.argv[1:]]),
            "narrow": arguments.narrow,
            "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__,
            "capability": torch.backends.cpu.get_cpu_capability(),
            "before": asdict(before),
            "now": asdict(now),
        }
        others = [own for own in read() if own["narrow"] != arguments.narrow]
        RESULTS.write_text(json.dumps([*others, result], indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Times of runs over the time of their products, at several widths: what estimated times rest on.

The shipped model, and generated ones with DeepSeek-V2-Lite's experts (64, top-6) whose widths are
divided; one MoE layer, 8,192 tokens, one thread. Processor time, which other work on the machine
changes less than the wall's.

    python -m benchmarks.durations --write
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.full_width import EXAMPLE, lite_config, write_checkpoint
from tuckerize.calibration.calibration_pass import CalibrationPass
from tuckerize.healing.training import Schedule
from tuckerize.moe.source import SourceModel
from tuckerize.planning.duration import product_rate, profile_work, training_work, work
from tuckerize.planning.plan import make_plan
from tuckerize.recipe import Recipe
from tuckerize.recipe_reader import recipe_of_options

RESULTS = Path(__file__).parent / "results" / "durations.json"
TEXT = EXAMPLE / "held_out.txt"
CALIBRATION = {"texts": [str(TEXT)], "tokens": 8192, "refine": 10}
RANK, HEAL_STEPS = "full,full,75%", 2


@dataclass(frozen=True)
class Run:
    """A command and its products.

    Attributes:
        name: Name of the command.
        hidden: Hidden size of the model.
        seconds: Processor seconds.
        operations: Estimated floating-point operations.
        copied_bytes: Bytes that are copied beside them.
        rate: Operations per second of a GEMM, after the command.
    """

    name: str
    hidden: int
    seconds: float
    operations: float
    copied_bytes: int
    rate: float


def seconds_of(cache: Path, *words: str | Path) -> float:
    """Processor seconds of a command."""
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(cache),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "tuckerize", *map(str, words)]
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def operations_of(source: SourceModel, recipe: Recipe) -> float:
    """Operations of a decomposition."""
    plan = make_plan(source, recipe)
    return sum(work(plan, piece) for piece in plan.layer_pieces)


def training_operations(source: SourceModel) -> float:
    """Operations of `tuckerize heal` on two steps; one window in sixteen of the text decides."""
    schedule = Schedule(HEAL_STEPS, 16, 4, 1e-3, 0)
    tokens = HEAL_STEPS * 16 * 512
    return training_work(
        source.size,
        active_share=source.moe.routing.top_k / source.moe.shape.experts,
        tokens=tokens,
        judged=len(schedule.validated) * tokens // 16,
        forwards=3,
    )


def measure(model: Path, folder: Path) -> list[Run]:
    """The commands on one model."""
    source = SourceModel.open(model)
    calibrated = recipe_of_options(
        None, sizes={"rank": RANK}, where={}, how={"calibration": CALIBRATION}
    )
    opened = CalibrationPass.open(source, calibrated, torch.device("cpu"))
    plain = recipe_of_options(None, sizes={"rank": "50%,50%,50%"}, where={}, how={})
    cache, out = folder / "cache", folder / "out"
    text = ("--calibration", TEXT, "--calibration-tokens", "8192")
    decompose = ("decompose", "--model", model, "--output", out, "--overwrite")
    healed = folder / "healed"
    commands: dict[str, tuple[tuple[str | Path, ...], float]] = {
        "decompose, data-free": (
            (*decompose, "--rank", "50%,50%,50%"),
            operations_of(source, plain),
        ),
        "plan": (("plan", "--model", model, *text), profile_work(opened)),
        "decompose, calibrated": (
            (*decompose, *text, "--rank", RANK, "--refine", "10"),
            operations_of(source, calibrated),
        ),
        "heal": (
            ("heal", out, "--data", TEXT, "--output", healed, "--tokens", "16384"),
            training_operations(source),
        ),
    }
    runs = []
    for name, (words, operations) in commands.items():
        copied = source.checkpoint.bytes if name.startswith("decompose") else 0
        seconds = seconds_of(cache, *words)
        product_rate.cache_clear()
        hidden, rate = source.moe.shape.hidden, product_rate()
        runs.append(Run(name, hidden, seconds, operations, copied, rate))
    return runs


def main() -> None:
    """Measure, print, and write the results if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="durations-") as temporary:
        for narrow in (0, 8, 4):
            folder = Path(temporary, str(narrow))
            folder.mkdir()
            model = folder / "model" if narrow else EXAMPLE / "tiny-moe"
            if narrow:
                write_checkpoint(model, lite_config(2, dense_layers=1, narrow=narrow))
            runs += measure(model, folder)
    # The largest: processor time does not have either what others took of the processor.
    rate = max(run.rate for run in runs)
    for run in runs:
        times = run.seconds * rate / run.operations
        print(f"{run.hidden:5} {run.name:24}{run.seconds:7.1f} s{times:7.1f}")
    if arguments.write:
        result = {
            "command": "python -m benchmarks.durations --write",
            "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__,
            "capability": torch.backends.cpu.get_cpu_capability(),
            "runs": [{**asdict(run), "rate": rate} for run in runs],
        }
        RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

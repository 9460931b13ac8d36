"""Read, compute and write times of a data-free decomposition at DeepSeek-V2-Lite's width.

    python -m benchmarks.reading --write

Two layers of generated weights; the model's files are in memory, or dropped from it before.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tuckerize
from benchmarks.full_width import lite_config, write_checkpoint
from tuckerize.compression import write as layers
from tuckerize.moe.source import SourceModel
from tuckerize.pipeline import run_plan

RESULTS = Path(__file__).parent / "results" / "reading.json"
LAYERS = 2


class Clock:
    """Seconds inside of functions, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time counted."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # as the function
            started = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0) + time.monotonic() - started

        return wrapped


def drop_from_memory(folder: Path) -> None:
    """Have the files of a folder read from the disk again."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(model: Path, output: Path) -> dict[str, float]:
    """Seconds of reading, writing (hashes included), and the rest."""
    clock = Clock()
    places: list[tuple[Any, str, str]] = [
        (SourceModel, "stack", "read"),
        (layers, "write_tensors", "write"),
        (run_plan, "copy_tensors", "write"),
    ]
    before = [getattr(owner, name) for owner, name, _ in places]
    for (owner, name, what), function in zip(places, before, strict=True):
        setattr(owner, name, clock.timed(what, function))
    started = time.monotonic()
    try:
        tuckerize.decompose(
            tuckerize.DecomposeRequest(model=str(model), output=str(output), keep=0.75)
        )
    finally:
        for (owner, name, _), function in zip(places, before, strict=True):
            setattr(owner, name, function)
    rest = time.monotonic() - started - sum(clock.seconds.values())
    found = {"read": clock.seconds["read"], "compute": rest, "write": clock.seconds["write"]}
    return {name: round(seconds, 2) for name, seconds in found.items()}


def main() -> None:
    """Measure, print, and write the results if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    arguments = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory(prefix="reading-", dir=Path.cwd()) as temporary:
        folder = Path(temporary)
        write_checkpoint(folder / "model", lite_config(LAYERS + 1, dense_layers=1))
        for where in ("memory", "disk"):
            if where == "disk":
                drop_from_memory(folder / "model")
            rows[where] = measure(folder / "model", folder / where)
            print(where, rows[where])
    if arguments.write:
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "layers": LAYERS,
        }
        RESULTS.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

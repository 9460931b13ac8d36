"""Under torchrun or alone: several recovery trainings, one after another, some of them interrupted.

Usage: healing_runs.py RUNS.json
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from tuckerize import HealRequest
from tuckerize.parallel.processes import process_group
from tuckerize.pipeline import heal
from tuckerize.progress import SilentProgress


class Stop(SilentProgress):
    """Interrupts a run after some steps."""

    def __init__(self, after: int | None) -> None:
        self.left = after
        self.resumed = False

    def advance(self, amount: float, note: str) -> None:
        del amount
        self.resumed |= note == "resumed"
        if self.left is not None:
            self.left -= note.startswith("loss")
            if not self.left:
                raise KeyboardInterrupt


def run(runs: list[dict[str, Any]]) -> None:
    """Make all runs; those of which `stop` is the number of steps are interrupted after them."""
    for settings in runs:
        how = dict(settings)
        stop, continues = how.pop("stop", None), how.pop("continues", False)
        progress = Stop(stop)
        try:
            heal.heal(HealRequest(**how), progress)
        except KeyboardInterrupt:
            continue
        assert stop is None
        assert progress.resumed == continues


def main() -> None:
    """Make all runs in one process group: to join another needs new processes."""
    with ExitStack() as stack:
        joined = stack.enter_context(process_group(lambda _: torch.device("cpu")))
        vars(heal)["process_group"] = lambda *_: nullcontext(joined)
        run(json.loads(Path(sys.argv[1]).read_text()))


if __name__ == "__main__":
    main()

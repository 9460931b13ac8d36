"""Under torchrun or alone: several calibrated decompositions, one after another.

Usage: calibrated_runs.py RUNS.json
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import pytest
import torch

from tuckerize import DecomposeRequest
from tuckerize.calibration import tokens
from tuckerize.format.manifest import read_tucker_manifest
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.parallel.processes import process_group
from tuckerize.pipeline import decompose, memory
from tuckerize.planning.estimate import Need, need_within
from tuckerize.planning.plan import Plan
from tuckerize.progress import SilentProgress


class Stop(SilentProgress):
    """Interrupts a run at a stage of a layer, if it is given one."""

    def __init__(self, at: str | None) -> None:
        self.at = at
        self.continued = 0.0

    def stage(self, name: str) -> None:
        if name == self.at:
            raise KeyboardInterrupt

    def advance(self, amount: float, note: str) -> None:
        if note == "continued":
            self.continued += amount


def run(runs: list[dict[str, Any]]) -> None:
    """Make all runs; one with a stage in `stop` is interrupted there.

    Those with `files` have hidden states, tokens and outputs in files.
    """
    tokens.HELD_OUT_BLOCK = 64  # 1024 tokens have a validation set
    for settings in runs:
        how = dict(settings)
        stop, continued = how.pop("stop", None), how.pop("continued", 0)
        in_files = how.pop("files", False)
        progress = Stop(stop)
        with pytest.MonkeyPatch.context() as patch:
            if in_files:
                patch.setattr(memory, "need_within", _in_files)
            try:
                decompose.decompose(DecomposeRequest(**how), progress)
            except KeyboardInterrupt:
                continue
        assert stop is None
        assert progress.continued == continued


def _in_files(
    plan: Plan, available: int, processes: int, *, profile_of: bool | None, on_host: bool
) -> Need:
    need = need_within(plan, available, processes, profile_of=profile_of, on_host=on_host)
    return need._replace(states_held=False)


def same(found: Path, expected: Path) -> None:
    """Compare two Tucker checkpoints by the neurons that are kept, and by their errors.

    Float32 rounds sums in another order, and U_I is sensitive to that where spectra are flat, the
    residuals of weights, which nothing minimises, most of all, and behind a layer that was refined
    and rounded the choice between neurons of equal cost;
    tests/unit/calibration/test_shared_layer.py compares the weights, in float64.
    """
    one, other = (read_tucker_manifest(folder) for folder in (expected, found))
    assert one.calibrated
    for exact, near in zip(one.calibrated, other.calibrated, strict=True):
        if exact is one.calibrated[0] or not one.cores:
            assert near.kept == exact.kept
        else:
            assert len(near.kept) == len(exact.kept)
            for group in range(len(exact.kept)):
                masks = [own.kept_neurons(exact.layer, group) for own in (one, other)]
                first_EH, second_EH = (np.asarray(0 if own is None else own) for own in masks)
                assert first_EH.sum() == second_EH.sum()
                assert (first_EH != second_EH).mean() < 0.04
        assert (near.output_error is None) == (exact.output_error is None)
        assert (near.output_error or 0) == pytest.approx(exact.output_error or 0, rel=2e-2)
        assert near.refined == exact.refined
    for stack, its in zip(one.stacks, other.stacks, strict=True):
        assert its.multilinear_rank == stack.multilinear_rank
        assert its.relative_residual == pytest.approx(stack.relative_residual, rel=5e-2)
    assert TuckerCheckpoint.open(found).checkpoint.tensors.keys() == (
        TuckerCheckpoint.open(expected).checkpoint.tensors.keys()
    )


def main() -> None:
    """Make all runs in one process group: to join another needs new processes."""
    with ExitStack() as stack:
        joined = stack.enter_context(process_group(lambda _: torch.device("cpu")))
        vars(decompose)["process_group"] = lambda *_: nullcontext(joined)
        run(json.loads(Path(sys.argv[1]).read_text()))


if __name__ == "__main__":
    main()

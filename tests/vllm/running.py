"""Runs of the real vLLM engine, in a process of their own, and checkpoints for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.running import ROOT, succeed

_ENGINE = Path(__file__).with_name("engine.py")
SECONDS = 600

Found = dict[str, Any]

LATENT = """
schema_version: 1
joint: gate_up
rules:
  - projections: [gate_proj, up_proj]
    rank: full,full,32
  - projections: [down_proj]
    rank: full,full,{down}
"""
"""Recipe of layers that the engine's kernels compute."""


def run(folders: Sequence[Path], *options: str) -> list[Found]:
    """What the engine gives with each of the checkpoints, see engine.py."""
    result = subprocess.run(
        [sys.executable, _ENGINE, *folders, *options],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("FOUND")]
    assert len(lines) == len(folders), result.stdout[-3000:] + result.stderr[-3000:]
    return [json.loads(line.removeprefix("FOUND")) for line in lines]


def decompose(model: Path, output: Path, *options: str | Path) -> Path:
    """A Tucker checkpoint of a model."""
    succeed("decompose", "--model", model, *options, "--output", output)
    return output


def reconstruct(checkpoint: Path) -> Path:
    """The dense model that a checkpoint stands for, beside it."""
    dense = checkpoint.with_name(f"{checkpoint.name}-reconstructed")
    succeed("reconstruct", checkpoint, "--output", dense)
    return dense

"""Experts that are read whenever they are used, and states in files, give what memory gives."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from torch import Tensor

import tuckerize
from tests.running import files_of
from tuckerize.calibration import calibration_pass
from tuckerize.calibration import tokens as tokens_module
from tuckerize.calibration.calibration_pass import CalibrationPass
from tuckerize.calibration.layer_profile import LayerProfile
from tuckerize.calibration.profile_pass import profile_model
from tuckerize.calibration.tokens import StacksOnDisk
from tuckerize.domain import Projection
from tuckerize.planning.estimate import Need
from tuckerize.progress import SilentProgress

memory = importlib.import_module("tuckerize.pipeline.memory")


class Run(NamedTuple):
    """Result of a decomposition, and the profiles that it made."""

    files: dict[str, bytes]
    profiles: list[LayerProfile]
    whole_stacks: int
    matrices: int
    state_files: int


def decompose(
    model: Path, text: Path, folder: Path, patch: pytest.MonkeyPatch, target: str, *, held: bool
) -> Run:
    """Decompose with experts and states in memory or on disk; factors need experts in memory."""
    profiles: list[LayerProfile] = []
    whole = matrices = files = 0

    def profile(run: CalibrationPass, progress: object, *, spectra: bool) -> list[LayerProfile]:
        assert (run.held, run.scratch) == (held, None if held else temporary)
        del progress
        profiles.extend(profile_model(run, SilentProgress(), spectra=spectra))
        return profiles

    def read_whole(stacks: StacksOnDisk, projection: object) -> object:
        nonlocal whole
        whole += 1
        return stacks.read(projection, stacks.experts)  # type: ignore[arg-type]

    temporary = folder / "temporary"
    temporary.mkdir(parents=True)
    patch.setattr(tempfile, "tempdir", str(temporary))

    def read_matrix(stacks: StacksOnDisk, projection: Projection, place: int) -> Tensor:
        nonlocal matrices
        matrices += 1
        return matrix(stacks, projection, place)

    def allocate(*where: int) -> None:
        nonlocal files
        files += 1
        posix_fallocate(*where)

    posix_fallocate, matrix = os.posix_fallocate, StacksOnDisk.matrix
    patch.setattr(StacksOnDisk, "matrix", read_matrix)
    patch.setattr(os, "posix_fallocate", allocate)
    need = Need(0, 1, held, held or target == "free", states_held=held)
    patch.setattr(memory, "need_within", lambda *_args, **_how: need)
    patch.setattr(StacksOnDisk, "__getitem__", read_whole)
    patch.setattr(importlib.import_module("tuckerize.planning.duration"), "profile_model", profile)
    patch.setattr(tokens_module, "HELD_OUT_BLOCK", 64)
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    out = folder / "out"
    tuckerize.decompose(
        tuckerize.DecomposeRequest(
            model=model,
            output=out,
            keep=0.5,
            quantize="w4",
            calibration={
                "texts": [str(text)],
                "tokens": 1024,
                "window": 128,
                "refine": 0,
                "multiple": 1,
                "target": target,
            },
        )
    )
    assert not list(temporary.iterdir())
    patch.setattr(os, "posix_fallocate", posix_fallocate)
    patch.setattr(StacksOnDisk, "matrix", matrix)
    return Run(files_of(out), profiles, whole, matrices, files)


@pytest.mark.parametrize("target", ["any-engine", "free"])
def test_experts_and_states_on_disk_give_the_bytes_of_those_in_memory(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    held, on_disk = (
        decompose(model, text, tmp_path / str(held), monkeypatch, target, held=held)
        for held in (True, False)
    )
    for one, other in zip(held.profiles, on_disk.profiles, strict=True):
        for name in LayerProfile.__slots__:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert held.files.keys() == on_disk.files.keys()
    for name, content in held.files.items():
        if name.endswith(".safetensors"):
            assert on_disk.files[name] == content
    first, second = (json.loads(run.files["tuckerize.json"]) for run in (held, on_disk))
    for one, other in zip(first.pop("stacks"), second.pop("stacks"), strict=True):
        residuals = one.pop("relative_residual"), other.pop("relative_residual")
        assert residuals[0] == pytest.approx(residuals[1], rel=1e-6)
        assert one == other
    del first["checksum"], second["checksum"]  # of the residuals too
    assert first == second
    # Whole stacks are read where they are held, and never otherwise.
    layers, projections = 2, 3
    assert held.whole_stacks == 2 * layers * projections
    assert (held.state_files > 0, on_disk.state_files > 0) == (False, True)
    assert on_disk.whole_stacks == (0 if target == "any-engine" else layers * projections)


def test_experts_of_large_layers_are_read_for_many_windows_at_once(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = decompose(model, text, tmp_path / "few", monkeypatch, "any-engine", held=False)
    monkeypatch.setattr(calibration_pass, "_LARGE_LAYER_VALUES", 0)
    many = decompose(model, text, tmp_path / "many", monkeypatch, "any-engine", held=False)
    # In both passes the text goes through the experts in one part, not in four.
    layers, experts, projections = 2, 8, 3
    assert few.matrices - many.matrices >= 2 * 3 * layers * experts * projections

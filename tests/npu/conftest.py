"""The stand-in NPU for child processes: a torch_npu on their path that torch finds by itself."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.npu.installing import STANDIN, installed
from tests.running import run_module

# They run in processes of their own, where torch_npu can be imported.
collect_ignore = ["standin", "scripts"]


@pytest.fixture(scope="session")
def standin_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The PYTHONPATH of the stand-in, compiled."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("the stand-in NPU needs a C++ compiler (g++, or CXX), and there is none")
    path = installed(tmp_path_factory.mktemp("npu") / "path", package=STANDIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        compiled = run_module("tests.npu.scripts.available")
    assert compiled.returncode == 0, compiled.stderr
    return path


@pytest.fixture
def npu(standin_path: str, tmp_path: Path) -> Iterator[None]:
    """Child processes have NPUs, and fallbacks to the CPU are errors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", standin_path)
        patch.setenv("TORCH_NPU_FALLBACK_CPU_DISABLE", "1")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield

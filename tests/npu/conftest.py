"""The stand-in NPU for child processes: a torch_npu on their path that torch finds by itself."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.running import run_module

# They run in processes of their own, where torch_npu can be imported.
collect_ignore = ["standin", "scripts"]

STANDIN = Path(__file__).parent / "standin"


def installed(folder: Path, *, package: Path | None = None, code: str = "") -> str:
    """A PYTHONPATH on which a torch_npu of torch's own version seems to be installed.

    Args:
        folder: Where the distribution is described.
        package: Folder that holds the package; without one, `code` is the package.
    """
    version = torch.__version__.partition("+")[0]
    information = folder / f"torch_npu-{version}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {version}\n"
    )
    (information / "entry_points.txt").write_text(
        "[torch.backends]\ntorch_npu = torch_npu:_autoload\n"
    )
    if package is None:
        (folder / "torch_npu").mkdir()
        (folder / "torch_npu" / "__init__.py").write_text(code)
    return os.pathsep.join(map(str, [folder, package] if package else [folder]))


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

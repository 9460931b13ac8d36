"""A torch_npu that seems to be installed, for child processes."""

from __future__ import annotations

import os
from pathlib import Path

import torch

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

"""Compile device.cpp once for every version of it and of torch, and load it."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("device.cpp")


def load_device() -> Any:  # noqa: ANN401
    """The compiled module; compiles it where that has not been done before."""
    path = _library()
    if not path.exists():
        _compile(path)
    loader = importlib.machinery.ExtensionFileLoader("device", str(path))
    spec = importlib.util.spec_from_file_location("device", path, loader=loader)
    if spec is None:
        raise ImportError(str(path))
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _library() -> Path:
    """Where it is kept, by the hash of what it is made of."""
    made_of = [SOURCE.read_text(), torch.__version__, sysconfig.get_config_var("SOABI")]
    digest = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]
    return SOURCE.parents[4] / "build" / "npu-standin" / f"{digest}.so"


def _compile(path: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    includes = [*include_paths(), sysconfig.get_path("include")]
    command = [
        os.environ.get("CXX", "g++"),
        *("-shared", "-fPIC", "-std=c++20", "-O0", "-w"),
        *("-DTORCH_EXTENSION_NAME=device", "-DUSE_C10D"),
        *(f"-I{folder}" for folder in includes),
        str(SOURCE),
        *(f"-L{folder}" for folder in library_paths()),
        *("-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"),
        *("-o", str(part)),
    ]
    subprocess.run(command, check=True)
    part.replace(path)  # whole or not at all: others may compile it at the same time

"""Sealed weight files: tensors with a label and the hash of both; see `sealed`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tuckerize.checkpoint.writer import raw_bytes, write_tensors


def write_sealed(path: Path, label: str, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, a label that says what they are, and the hash of both."""
    write_tensors(path, tensors, {"label": label, "sha256": _hash(label, tensors)})


def read_sealed(path: Path, label: str) -> dict[str, Tensor] | None:
    """The tensors of a sealed file; None if it is missing, damaged, or of another label."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, UnicodeDecodeError):
        return None
    is_whole = metadata.get("sha256") == _hash(label, tensors)
    return tensors if is_whole else None


def _hash(label: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(label.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()

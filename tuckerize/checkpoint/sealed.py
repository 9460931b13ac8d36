"""Sealed files: they carry the hash of their own contents, and are taken whole or not at all.

For what a run can make again: records, hidden states, caches. Reading gives None in place of an
error: the file is missing, damaged, or another one that was put in its place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuckerize.checkpoint.files import read_json_object, write_json
from tuckerize.errors import CheckpointError


def json_sha256(value: object) -> str:
    """SHA-256 of JSON values, however they are laid out."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_sealed_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON values and their hash."""
    write_json(path, {"sha256": json_sha256(value), "sealed": value})


def read_sealed_json(path: Path) -> dict[str, Any] | None:
    """The values of a sealed JSON file, or None."""
    try:
        found = read_json_object(path)
    except CheckpointError:
        return None
    value = found.get("sealed")
    is_whole = isinstance(value, dict) and found.get("sha256") == json_sha256(value)
    return value if is_whole else None

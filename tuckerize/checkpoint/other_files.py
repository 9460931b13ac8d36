"""Files of a checkpoint other than weights, index and config: tokenizer, settings, code."""

from __future__ import annotations

import shutil
from pathlib import Path

from tuckerize.checkpoint.files import atomic_path
from tuckerize.checkpoint.output import REPORT
from tuckerize.checkpoint.weight_set import CONFIG

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_OWN_PREFIX = "tuckerize"


def copy_other_files(source: Path, output: Path) -> list[str]:
    """Copy the files of a checkpoint that are neither weights nor written anew; their names."""
    copied = []
    for path in sorted(source.iterdir()):
        if path.is_file() and not _is_written_anew(path.name):
            with atomic_path(output / path.name) as temporary:
                shutil.copyfile(path, temporary)
            copied.append(path.name)
    return copied


def _is_written_anew(name: str) -> bool:
    return (
        name in (CONFIG, REPORT)
        or name.startswith((".", _OWN_PREFIX))
        or name.endswith((*_WEIGHT_SUFFIXES, ".index.json"))
    )

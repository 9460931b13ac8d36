"""Files of a checkpoint other than weights, index and config: tokenizer, settings, code."""

from __future__ import annotations

import shutil
from pathlib import Path

from tuckerize.checkpoint.files import atomic_path
from tuckerize.checkpoint.output import REPORT
from tuckerize.checkpoint.weight_set import CONFIG

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
# transformers' folder of the chat templates beside the first.
_CHAT_TEMPLATES = "additional_chat_templates"
_OWN_PREFIX = "tuckerize"


def copy_other_files(source: Path, output: Path) -> list[str]:
    """Copy the files of a checkpoint that are neither weights nor written anew; their names."""
    paths = [path for path in source.iterdir() if not _is_written_anew(path.name)]
    paths += (source / _CHAT_TEMPLATES).glob("*.jinja")
    names = sorted(str(path.relative_to(source)) for path in paths if path.is_file())
    for name in names:
        (output / name).parent.mkdir(exist_ok=True)
        with atomic_path(output / name) as temporary:
            shutil.copyfile(source / name, temporary)
    return names


def _is_written_anew(name: str) -> bool:
    return (
        name in (CONFIG, REPORT)
        or name.startswith((".", _OWN_PREFIX))
        or name.endswith((*_WEIGHT_SUFFIXES, ".index.json"))
    )

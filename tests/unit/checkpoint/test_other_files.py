from __future__ import annotations

from pathlib import Path

from tests.running import files_of
from tuckerize.checkpoint.other_files import copy_other_files


def test_copy_other_files_takes_neither_weights_nor_what_is_written_anew(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    (source / "folder").mkdir(parents=True)
    output.mkdir()
    kept = ["tokenizer.json", "generation_config.json", "modeling_own.py", "tokenizer.model"]
    left = [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "tuckerize.json",
        ".gitattributes",
        "verify.json",
    ]
    kept.append("additional_chat_templates/tool_use.jinja")
    left.append("additional_chat_templates/notes.txt")
    (source / "additional_chat_templates").mkdir()
    for name in kept + left:
        (source / name).write_bytes(name.encode())
    assert copy_other_files(source, output) == sorted(kept)
    assert files_of(output).keys() == set(kept)
    assert all((output / name).read_bytes() == name.encode() for name in kept)

"""The weights of a folder are those that transformers loads; what cannot be told is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tuckerize.checkpoint.hub import resolve_model
from tuckerize.checkpoint.reader import Checkpoint
from tuckerize.checkpoint.weight_set import CONFIG, INDEX, SINGLE_FILE
from tuckerize.errors import CheckpointError

NORM = "model.norm.weight"


def norm_by_transformers(folder: Path) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    norm: torch.Tensor = model.model.norm.weight.detach()
    return norm


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def with_norm(folder: Path, file: str, value: float) -> None:
    """Set a tensor of a weight file, so that it tells which file was read."""
    tensors = load_file(folder / file)
    tensors[NORM] = torch.full((32,), value, dtype=torch.bfloat16)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def surplus_entry(folder: Path) -> None:
    edit_index(folder, lambda files: files.update({"mtp.fc.weight": files[NORM]}))


def missing_entry(folder: Path) -> None:
    edit_index(folder, lambda files: files.pop(NORM))


def wrong_entry(folder: Path) -> None:
    edit_index(folder, lambda files: files.update({NORM: files["model.embed_tokens.weight"]}))


def duplicate(folder: Path) -> None:
    """A tensor in two files, the same in both."""
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    tensors = load_file(folder / files[0])
    tensors[NORM] = Checkpoint.open(folder).read_one(NORM)
    save_file(tensors, folder / files[0], metadata={"format": "pt"})


def stale_index(folder: Path) -> None:
    """A single file beside the index of another set, whose files are gone."""
    save_as_one(folder)
    for path in folder.glob("model-*"):
        path.unlink()


def index_of_one(folder: Path) -> None:
    save_as_one(folder)
    edit_index(folder, lambda files: files.update(dict.fromkeys(files, SINGLE_FILE)))


def save_as_one(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    tensors = dict(checkpoint.read(checkpoint.tensors))
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    with_norm(folder, SINGLE_FILE, 0.25)


@pytest.mark.parametrize(
    "change", [surplus_entry, missing_entry, wrong_entry, duplicate, stale_index, index_of_one]
)
def test_weights_of_an_odd_folder_are_those_that_transformers_loads(
    change: Callable[[Path], None], tiny_sharded_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_sharded_model, tmp_path / "model")
    names = set(Checkpoint.open(folder).tensors)
    change(folder)
    checkpoint = Checkpoint.open(folder)
    assert set(checkpoint.tensors) == names
    assert torch.equal(checkpoint.read_one(NORM), norm_by_transformers(folder))


def test_two_sets_of_weights_are_refused_and_both_are_named(
    tiny_sharded_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_sharded_model, tmp_path / "model")
    save_as_one(folder)
    with pytest.raises(CheckpointError, match="two sets of weights") as caught:
        Checkpoint.open(folder)
    assert all(name in caught.value.message for name in (SINGLE_FILE, INDEX, "model-00001-of"))
    (folder / INDEX).unlink()  # the remedy: what is left is what is read
    assert Checkpoint.open(folder).read_one(NORM)[0] == 0.25


def test_numbered_files_need_no_index_if_they_are_complete(
    tiny_sharded_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_sharded_model, tmp_path / "model")
    whole = Checkpoint.open(folder)
    (folder / INDEX).unlink()
    found = Checkpoint.open(folder)
    assert (found.tensors, found.file_of) == (whole.tensors, whole.file_of)
    min(folder.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="nor all files of its set"):
        Checkpoint.open(folder)


def test_tensor_that_differs_between_two_files_is_refused(
    tiny_sharded_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_sharded_model, tmp_path / "model")
    duplicate(folder)
    with_norm(folder, min(path.name for path in folder.glob("*.safetensors")), 0.5)
    with pytest.raises(CheckpointError, match=f"different tensors named {NORM}"):
        Checkpoint.open(folder)


def test_command_for_pickled_weights_converts_them(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    tensors = load_file(folder / SINGLE_FILE)
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / SINGLE_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"but pytorch_model\.bin") as caught:
        Checkpoint.open(folder)
    (code,) = re.findall(r"python -c '(.*?)'", caught.value.hint)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    converted = Checkpoint.open(tmp_path / "NEW")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in converted.read(tensors))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 4995584848\n"


@pytest.mark.parametrize("name", [SINGLE_FILE, CONFIG])
def test_pointer_of_git_lfs_is_named(name: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=f"{name} is a Git LFS pointer") as caught:
        Checkpoint.open(folder)
    assert f"git -C {folder} lfs pull" in caught.value.hint


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        (["adapter_config.json"], "holds a LoRA adapter", "merge_and_unload"),
        (["a.gguf"], "holds a GGUF file", "converted from"),
        (["config.json", "a.gguf"], "but a GGUF file", "converted from"),
        (["params.json", "consolidated.safetensors"], "format of its authors", "hf download"),
        (["model/config.json"], "has no config.json, but", "did you mean"),
        (["snapshots/abc/config.json", "refs/main"], "snapshots/abc has", "snapshots/abc?"),
    ],
)
def test_folder_of_something_else_is_named(
    files: list[str], message: str, hint: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(resolve_model(str(tmp_path)))
    assert message in caught.value.message
    assert hint in caught.value.hint

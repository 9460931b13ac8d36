from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tuckerize.checkpoint.files import write_json
from tuckerize.checkpoint.reader import Checkpoint, WeightFile, read_tensors
from tuckerize.checkpoint.weight_set import CONFIG, INDEX, SINGLE_FILE
from tuckerize.checkpoint.writer import write_tensors
from tuckerize.domain import TensorHeader
from tuckerize.errors import CheckpointError


def copy_of(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder / "copy"))


def write_file(path: Path, header: object, data: bytes = b"") -> Path:
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def entry(start: int, stop: int, **changes: object) -> dict[str, object]:
    return {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop], **changes}


@pytest.mark.parametrize("fixture", ["tiny_model", "tiny_sharded_model"])
def test_checkpoint_opened_has_the_headers_that_safetensors_reads(
    request: pytest.FixtureRequest, fixture: str
) -> None:
    folder: Path = request.getfixturevalue(fixture)
    checkpoint = Checkpoint.open(folder)
    expected: dict[str, tuple[str, tuple[int, ...], str]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 not a mapping
                part = file.get_slice(name)
                expected[name] = (part.get_dtype(), tuple(part.get_shape()), path.name)
    assert {
        name: (header.dtype, header.shape, checkpoint.file_of[name])
        for name, header in checkpoint.tensors.items()
    } == expected


def test_checkpoint_with_an_index_counts_the_bytes_of_the_index(tiny_sharded_model: Path) -> None:
    checkpoint = Checkpoint.open(tiny_sharded_model)
    metadata = json.loads((tiny_sharded_model / INDEX).read_text())["metadata"]
    assert len(checkpoint.files) > 1
    assert checkpoint.bytes == metadata["total_size"]
    assert checkpoint.parameters == metadata["total_parameters"]


def test_checkpoint_of_a_single_file_counts_the_bytes_of_its_tensors(tiny_model: Path) -> None:
    tensors = load_file(tiny_model / SINGLE_FILE)
    checkpoint = Checkpoint.open(tiny_model)
    assert checkpoint.bytes == sum(t.numel() * t.itemsize for t in tensors.values())
    assert checkpoint.parameters == sum(t.numel() for t in tensors.values())
    assert checkpoint.config["model_type"] == "deepseek_v2"


def test_read_of_tensors_in_several_files_gives_each_once(tiny_sharded_model: Path) -> None:
    checkpoint = Checkpoint.open(tiny_sharded_model)
    expected = {
        name: tensor
        for path in tiny_sharded_model.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    read = list(checkpoint.read(reversed(list(expected))))
    assert len(read) == len(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read)


def test_read_of_rows_gives_those_of_the_first_dimension(tmp_path: Path) -> None:
    packed = torch.arange(60.0).view(5, 3, 4)
    write_json(tmp_path / CONFIG, {})
    write_tensors(tmp_path / SINGLE_FILE, {"packed": packed})
    ((name, rows),) = Checkpoint.open(tmp_path).read(["packed"], rows=range(1, 3))
    assert name == "packed"
    assert torch.equal(rows, packed[1:3])


def test_read_of_rows_does_not_load_the_rest(tmp_path: Path) -> None:
    size = 4 * 2**30
    packed = entry(0, size, dtype="BF16", shape=[2**11, 2**20])
    path = write_file(tmp_path / SINGLE_FILE, {"packed": packed})
    os.truncate(path, path.stat().st_size + size)  # zeros, which take no space
    write_json(tmp_path / CONFIG, {})
    before = peak_memory()
    ((_, rows),) = Checkpoint.open(tmp_path).read(["packed"], rows=range(7, 8))
    assert not rows.clone().any()
    assert peak_memory() - before < size / 8


def peak_memory() -> int:
    """Bytes of memory that this process has had at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def test_read_of_an_unknown_tensor_is_refused(tiny_model: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tensor nonsense$"):
        Checkpoint.open(tiny_model).read_one("nonsense")


def test_checkpoint_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert caught.value.message == f"{tmp_path} has neither {INDEX} nor {SINGLE_FILE}"
    assert caught.value.hint == "the folder is unfinished or is not a checkpoint"


def test_checkpoint_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        Checkpoint.open(tmp_path)


def test_checkpoint_with_a_missing_weight_file_is_refused(
    tiny_sharded_model: Path, tmp_path: Path
) -> None:
    folder = copy_of(tiny_sharded_model, tmp_path)
    missing = sorted(folder.glob("*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert caught.value.message == f"the weight file {missing} is missing"


def change_index(folder: Path, change: dict[str, object]) -> Path:
    index = folder / INDEX
    content = json.loads(index.read_text())
    content["weight_map"].update(change)
    index.write_text(json.dumps(content))
    return index


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "", ".."])
def test_index_that_names_a_file_outside_is_refused(
    tiny_sharded_model: Path, tmp_path: Path, name: str
) -> None:
    folder = copy_of(tiny_sharded_model, tmp_path)
    save_file({"evil": torch.zeros(1)}, tmp_path / "outside.safetensors")
    index = change_index(folder, {"evil": name})
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert caught.value.message == (
        f"{index} names the file {name!r}, expected a plain name in the same folder"
    )


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_index_without_a_usable_weight_map_is_refused(tmp_path: Path, weight_map: object) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"has no weight_map$"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", [["b"], None, 1, {}])
def test_index_that_places_a_tensor_in_no_file_is_refused(tmp_path: Path, name: object) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    message = f"{tmp_path / INDEX} places a in {name!r}, expected the name of a file"
    assert caught.value.message == message


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_weight_file_truncated_is_refused(tiny_model: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes((tiny_model / SINGLE_FILE).read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=f"^{path} "):
        WeightFile.open(path)


def test_weight_file_with_bytes_behind_its_data_is_refused(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.safetensors", {"a": entry(0, 4)}, b"12345")
    size = path.stat().st_size
    with pytest.raises(CheckpointError) as caught:
        WeightFile.open(path)
    assert caught.value.message == f"{path} has {size} bytes, its header describes {size - 1}"


@pytest.mark.parametrize(
    "header",
    [
        [],
        "text",
        {"a": None},
        {"a": {}},
        {"a": entry(0, 4, data_offsets=[0])},
        {"a": entry(0, 4, data_offsets=[0, 4, 4])},
        {"a": entry(0, 4, data_offsets=["0", "4"])},
        {"a": entry(0, 4, data_offsets=[0.0, 4.0])},
        {"a": entry(0, 4, data_offsets=[-4, 4])},
        {"a": entry(0, 4), "b": entry(4, 2, shape=[2])},
        {"a": entry(0, 4), "b": entry(0, 4)},
        {"a": entry(0, 2), "b": entry(3, 4)},
        {"a": entry(1, 4)},
        {"a": entry(0, 4, shape="4")},
        {"a": entry(0, 4, shape=["4"])},
        {"a": entry(0, 4, shape=[-4])},
        {"a": entry(0, 4, shape=[2.0, 2])},
        {"a": entry(0, 4, shape={"4": 4})},
        {"a": entry(0, 4, dtype=None)},
        {"a": entry(0, 4, dtype=["U8"])},
    ],
)
def test_weight_file_with_a_wrong_header_is_refused(tmp_path: Path, header: object) -> None:
    path = write_file(tmp_path / "a.safetensors", header, b"1234")
    with pytest.raises(CheckpointError, match=f"^{path} has no valid safetensors header: "):
        WeightFile.open(path)


@pytest.mark.parametrize(
    "content",
    [b"\x10\0\0\0\0\0\0\0" + b"\xff" * 16, struct.pack("<Q", 2**63) + b"x" * 50, b"garbage" * 20],
)
def test_weight_file_of_garbage_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{path} "):
        WeightFile.open(path)


def test_weight_file_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000) + b"[" * 100_000)
    with pytest.raises(CheckpointError, match="has no valid safetensors header"):
        WeightFile.open(path)


def test_weight_file_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        WeightFile.open(tmp_path)


def test_weight_file_opened_knows_where_the_data_lies(tmp_path: Path) -> None:
    header = {"b": entry(0, 4), "a": entry(4, 6), "e": entry(6, 6), "__metadata__": {"k": "v"}}
    path = write_file(tmp_path / "a.safetensors", header, b"abcdef")
    opened = WeightFile.open(path)
    content = path.read_bytes()
    assert {
        name: content[start : start + described.bytes]
        for name, (described, start) in opened.tensors.items()
    } == {"b": b"abcd", "a": b"ef", "e": b""}
    assert list(opened.tensors) == ["b", "a", "e"]
    assert opened.tensors["b"].header == TensorHeader("U8", (4,), 4)


def test_weight_file_without_tensors_is_read(tmp_path: Path) -> None:
    save_file({}, tmp_path / "a.safetensors")
    assert WeightFile.open(tmp_path / "a.safetensors").tensors == {}


def test_read_tensors_whose_size_contradicts_their_type_is_refused(tmp_path: Path) -> None:
    header = {"a": entry(0, 4, dtype="F32", shape=[2])}
    path = write_file(tmp_path / "a.safetensors", header, b"1234")
    with pytest.raises(CheckpointError, match=f"^{path} cannot be read: "):
        list(read_tensors(path, ["a"]))

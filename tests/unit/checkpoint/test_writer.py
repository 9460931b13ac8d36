from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tuckerize.checkpoint.files import describe_file, sha256_of
from tuckerize.checkpoint.reader import Checkpoint, WeightFile
from tuckerize.checkpoint.weight_set import INDEX
from tuckerize.checkpoint.writer import _TYPES, copy_tensors, write_index, write_tensors


def data_of(file: WeightFile, name: str) -> bytes:
    described, start = file.tensors[name]
    return file.path.read_bytes()[start : start + described.bytes]


def test_copy_tensors_of_some_gives_their_bytes_and_no_others(
    tiny_model: Path, tmp_path: Path
) -> None:
    source = WeightFile.open(tiny_model / "model.safetensors")
    names = list(source.tensors)[1::3]
    record = copy_tensors(tmp_path / "a.safetensors", source, list(reversed(names)))
    copied = WeightFile.open(tmp_path / "a.safetensors")
    assert list(copied.tensors) == names
    assert [data_of(copied, name) for name in names] == [data_of(source, name) for name in names]
    assert record == describe_file(copied.path)
    assert record.sha256 == sha256_of(copied.path)


def test_copy_tensors_writes_a_file_that_safetensors_loads(
    tiny_model: Path, tmp_path: Path
) -> None:
    source = WeightFile.open(tiny_model / "model.safetensors")
    copy_tensors(tmp_path / "a.safetensors", source, source.tensors)
    loaded, expected = load_file(tmp_path / "a.safetensors"), load_file(source.path)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_copy_tensors_keeps_bit_patterns_that_are_no_numbers(tmp_path: Path) -> None:
    bits = torch.tensor([0x7FC1, 0x7F80, 0xFF81], dtype=torch.uint16)
    write_tensors(tmp_path / "a.safetensors", {"nan": bits.view(torch.bfloat16)})
    source = WeightFile.open(tmp_path / "a.safetensors")
    copy_tensors(tmp_path / "b.safetensors", source, ["nan"])
    loaded = load_file(tmp_path / "b.safetensors")["nan"]
    assert loaded.view(torch.uint16).tolist() == bits.tolist()


def test_write_tensors_twice_gives_identical_bytes(tmp_path: Path) -> None:
    metadata = {key: key for key in "klmnop"}
    tensors = {
        name: torch.full((5, 3), place, dtype=torch.bfloat16) for place, name in enumerate("zyxabc")
    }
    reordered = dict(sorted(tensors.items()))
    first = write_tensors(tmp_path / "a.safetensors", tensors, metadata)
    second = write_tensors(tmp_path / "b.safetensors", reordered, metadata)
    assert (first.sha256, first.bytes) == (second.sha256, second.bytes)
    assert first.name == "a.safetensors"


def test_write_tensors_of_strided_views_stores_their_values(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    write_tensors(tmp_path / "a.safetensors", {"T": base.T, "column": base[:, 1:2]})
    loaded = load_file(tmp_path / "a.safetensors")
    assert torch.equal(loaded["T"], base.T)
    assert torch.equal(loaded["column"], base[:, 1:2])


def test_write_index_of_files_is_what_a_reader_expects(tmp_path: Path) -> None:
    paths = [tmp_path / f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    write_tensors(paths[0], {"b": torch.zeros(3), "a": torch.zeros(2, 2)})
    write_tensors(paths[1], {"c": torch.zeros(5, dtype=torch.bfloat16)})
    write_index(tmp_path, [WeightFile.open(path) for path in paths])
    assert json.loads((tmp_path / INDEX).read_text()) == {
        "metadata": {"total_size": 7 * 4 + 5 * 2, "total_parameters": 12},
        "weight_map": {"a": paths[0].name, "b": paths[0].name, "c": paths[1].name},
    }
    (tmp_path / "config.json").write_text("{}")
    assert Checkpoint.open(tmp_path).bytes == 38


def test_written_bytes_are_those_of_safetensors_itself(tmp_path: Path) -> None:
    """All types, in any order, with one entry of metadata: several have no fixed order there."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{index % 3}.ö.{name}": torch.randint(0, 2, (3, index % 4), generator=generator).to(dtype)
        for index, (name, dtype) in enumerate(reversed(_TYPES.items()))
        if dtype != torch.float8_e8m0fnu
    }
    tensors["scalar"] = torch.tensor(1.5)
    tensors["transposed"] = torch.arange(6).reshape(2, 3).T
    tensors["exponents"] = torch.tensor([127, 128], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    write_tensors(tmp_path / "own", tensors)
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(plain, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "own").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own", "theirs"]

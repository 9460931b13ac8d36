from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tuckerize.checkpoint.identity import identity
from tuckerize.checkpoint.sealed import read_sealed_json, write_sealed_json
from tuckerize.checkpoint.sealed_tensors import read_sealed, write_sealed

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7), "c": torch.zeros(0)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sealed")


def test_sealed_files_are_read_as_they_were_written(folder: Path) -> None:
    write_sealed_json(folder / "a.json", {"x": [1, 0.1, None]})
    assert read_sealed_json(folder / "a.json") == {"x": [1, 0.1, None]}
    write_sealed(folder / "a", "label", TENSORS)
    found = read_sealed(folder / "a", "label")
    assert found is not None
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_sealed_file_that_is_missing_or_of_another_label_is_none(folder: Path) -> None:
    write_sealed(folder / "b", "layer 1", TENSORS)
    assert read_sealed(folder / "b", "layer 2") is None
    assert read_sealed(folder / "missing", "layer 1") is None
    assert read_sealed_json(folder / "missing") is None


@given(st.data())
def test_sealed_file_with_any_flipped_bit_or_cut_is_none(folder: Path, data: st.DataObject) -> None:
    write_sealed(folder / "c", "label", TENSORS)
    write_sealed_json(folder / "c.json", {"x": [1, 2]})
    for path in (folder / "c", folder / "c.json"):
        whole = path.read_bytes()
        place = data.draw(st.integers(0, 8 * len(whole) - 1))
        cut = data.draw(st.booleans())
        bad = bytearray(whole[: place // 8] if cut else whole)
        if not cut:
            bad[place // 8] ^= 1 << place % 8
        path.write_bytes(bad)
        found = read_sealed(path, "label") if path.name == "c" else read_sealed_json(path)
        if found is not None:  # blanks and metadata that nothing reads
            assert not cut or path.name == "c.json"
            assert repr(found) == repr(TENSORS if path.name == "c" else {"x": [1, 2]})


def test_identity_tells_files_apart_in_a_single_byte_if_they_are_small(tmp_path: Path) -> None:
    path, found = tmp_path / "x", set()
    for content in (b"", b"a", b"b", b"aa", bytes(1000), bytes(999) + b"a"):
        path.write_bytes(content)
        found.add(identity(path))
    assert len(found) == 6


def test_identity_of_large_files_reads_blocks_all_over(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(9 * 2**20))
    before = identity(path)
    assert identity(path) == before
    for place in (0, 9 * 2**20 - 1):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"a")
        now = identity(path)
        assert now != before
        before = now

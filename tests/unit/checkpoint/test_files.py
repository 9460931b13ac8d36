from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import pytest

from tuckerize.checkpoint.files import (
    atomic_path,
    check_plain_name,
    copy_range,
    read_json_object,
    sha256_of,
    write_json,
)
from tuckerize.errors import CheckpointError


def test_atomic_path_of_a_new_file_leaves_only_the_file(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "a").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "new"


def test_atomic_path_after_an_exception_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def fail_while_writing() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_while_writing()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert path.read_text() == "old"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_atomic_path_permissions_respect_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_path(tmp_path / "a") as temporary:
            temporary.touch(mode=0o600)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("name", ["a.safetensors", "model-00001-of-00002.safetensors", "a..b", "é"])
def test_plain_name_is_accepted(tmp_path: Path, name: str) -> None:
    check_plain_name(name, found_in=tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "",
        256 * "a",
        128 * "ä",
        ".",
        "..",
        "../a",
        "a/b",
        "/etc/passwd",
        "a/",
        "./a",
        ".hidden",
        "a\\b",
        "..\\a",
        "a\0",
        "\ud800",
    ],
)
def test_name_that_is_not_plain_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_plain_name(name, found_in=tmp_path / "index")
    shown = repr(name[:255])
    expected = f"{tmp_path}/index names the file {shown}, expected a plain name in the same folder"
    assert caught.value.message == expected


def test_json_written_then_read_is_the_same(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, "é"], "a": {"c": True}}
    write_json(tmp_path / "a.json", value)
    assert read_json_object(tmp_path / "a.json") == value
    assert list(read_json_object(tmp_path / "a.json")) == ["b", "a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read as JSON: Expecting property name"),
        (b"", "cannot be read as JSON: Expecting value"),
        (b"\xff", "cannot be read as JSON: 'utf-8' codec"),
        (b"[" * 100_000, "cannot be read as JSON: maximum recursion depth"),
        (b"[1]", "holds a list, expected a JSON object"),
        (b"null", "holds a NoneType, expected a JSON object"),
    ],
)
def test_json_that_is_not_an_object_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_json_object(path)
    assert caught.value.message.startswith(f"{path} {message}")


def test_json_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a\.json does not exist$"):
        read_json_object(tmp_path / "a.json")


def test_json_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        read_json_object(tmp_path)


def test_sha256_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_copy_range_appends_the_bytes_of_the_range(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    target = io.BytesIO(b"x")
    target.seek(0, io.SEEK_END)
    copy_range(tmp_path / "a", 3, 4, target)
    assert target.getvalue() == b"x3456"


def test_copy_range_beyond_the_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123")
    with pytest.raises(CheckpointError, match=r"ends 2 bytes early$"):
        copy_range(tmp_path / "a", 2, 4, io.BytesIO())

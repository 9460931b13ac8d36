"""File utilities: atomic writes, hashes, JSON, and file names that are safe to join to a folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from tuckerize.errors import CheckpointError

TEMPORARY_SUFFIX = ".tmp"
"""Suffix of files that are being written."""

_LFS_POINTER = b"version https://git-lfs"
_CHUNK_BYTES = 16 * 2**20
_LONGEST_NAME = 255  # bytes, of every usual file system


Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Record(BaseModel):
    """Base of records that are read back from our own JSON files."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(Record):
    """Name, size in bytes and SHA-256 of a file."""

    name: str
    bytes: Count
    sha256: Sha256


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`, which it replaces if the block ends without an error.

    A reader sees the old file or the complete new one, even after a kill or a power failure.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        # Writing itself does not say where.
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def system_error(error: Exception) -> Exception:
    """The operating system's error that a library met and reports in words; else its own."""
    code = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(code[1]), os.strerror(int(code[1]))) if code else error


def _umask() -> int:
    """Umask of this process; needed because safetensors writes files for the owner only."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically, keeping the order of keys."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    try:
        write_text(path, text)
    except UnicodeEncodeError:  # halves of characters, which only an escape can write
        write_text(path, json.dumps(value, indent=2) + "\n")


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what Git leaves in the place of a large one when git-lfs is missing."""
    try:
        with path.open("rb") as file:
            return file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return False


def lfs_error(path: Path) -> CheckpointError:
    """Error for a file that is only a pointer."""
    return CheckpointError(
        f"{path} is a Git LFS pointer, not the file itself",
        hint=f"fetch the files: git -C {path.parent} lfs pull, or hf download OWNER/NAME",
    )


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Error for a file that the system does not give."""
    return CheckpointError(
        f"{path} cannot be read: {error.strerror}",
        hint="check that you may read the file, and that its disk is sound (dmesg)",
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object.

    Raises:
        CheckpointError: The file is missing, is not JSON, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist", hint="is the folder a checkpoint, and complete?"
        ) from None
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        if is_lfs_pointer(path):
            raise lfs_error(path) from error
        raise CheckpointError(
            f"{path} cannot be read as JSON: {error}", hint="fetch or write the file again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def sha256_of(path: Path, read: Callable[[int], object] = lambda _: None) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits.

    Args:
        path: The file.
        read: Called with the number of bytes of every chunk that was read.
    """
    digest, chunk = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(chunk):
            digest.update(chunk[:count])
            read(count)
    return digest.hexdigest()


def describe_file(path: Path, *, name: str = "") -> FileRecord:
    """Size and SHA-256 of a file, under its name or the one it will be given."""
    return FileRecord(name=name or path.name, bytes=path.stat().st_size, sha256=sha256_of(path))


def copy_range(source: Path, start: int, count: int, target: Any) -> None:  # noqa: ANN401
    """Append `count` bytes of a file, from `start`, to an open binary file."""
    with source.open("rb") as file:
        file.seek(start)
        while count > 0:
            chunk = file.read(min(_CHUNK_BYTES, count))
            if not chunk:
                raise CheckpointError(f"{source} ends {count} bytes early", hint="fetch it again")
            target.write(chunk)
            count -= len(chunk)


def check_plain_name(name: str, *, found_in: Path) -> None:
    """Check that a file name from a checkpoint is a plain name in its folder.

    Raises:
        CheckpointError: The name has a separator or half a character, is hidden, empty, a parent
            folder or longer than file systems allow.
    """
    encoded = name.encode(errors="ignore")
    is_path = set(name) & {"\\", "\0"} or PurePath(name).name != name
    is_file = encoded.decode() == name and 0 < len(encoded) <= _LONGEST_NAME
    if not is_file or name.startswith(".") or is_path:
        shown = name[:_LONGEST_NAME]
        raise CheckpointError(
            f"{found_in} names the file {shown!r}, expected a plain name in the same folder",
            hint="do not use this checkpoint: it was tampered with or damaged",
        )

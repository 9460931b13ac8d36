"""Text of files and data sets, in the encodings, packings and rows that people have.

Files are plain text, or rows: JSON lines, a JSON array or parquet; each may be compressed. A row
holds text or a conversation. Nothing is ever downloaded.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tuckerize.calibration.encoding import decode
from tuckerize.errors import UsageError

Chat = list[dict[str, Any]]
"""A conversation: messages with role and content, as chat templates take them."""

# First bytes of compressed files, and what reads them; zstd needs a package before Python 3.14.
_PACKED: Mapping[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7zXZ\x00": lzma.decompress,
}
_ZSTD, _PARQUET = b"\x28\xb5\x2f\xfd", b"PAR1"
_PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
_LINES, _ARRAY = (".jsonl", ".ndjson"), ".json"

# owner/name/configuration@split#column, or less of it, and no path of a text file.
_DATASET = re.compile(
    r"(?!.*\.(txt|jsonl|ndjson|json|parquet|gz|zst)(#.*)?$)"
    r"(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(/(?P<configuration>\w[\w.-]*))?"
    r"(@(?P<split>[\w.-]+))?(#(?P<column>\w[\w.-]*))?"
)
# Columns with text or a conversation, where none is named.
_COLUMNS = ("text", "messages", "conversations", "conversation")
# ShareGPT's roles in the words of chat templates.
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}


@dataclass(slots=True)
class Reader:
    """Reads sources of text.

    Attributes:
        render: Text of a conversation in the model's chat format, or None for its contents only.
        notes: What the user should know of the sources read so far.
    """

    render: Callable[[Chat], str] | None = None
    notes: list[str] = field(default_factory=list)

    def read(self, name: str, *, rows: int) -> list[str]:
        """Documents of a source: a file of plain text is one, and every row of others is one.

        Args:
            name: A file, `FILE#COLUMN`, or `owner/name/configuration@split#column` of a data set of
                the local cache.
            rows: Largest number of rows of a data set or a parquet file.

        Raises:
            UsageError: It is missing, cannot be read, or has no text.
        """
        path, column = find_file(name)
        if path is not None and path.is_dir():
            raise UsageError(f"{name} is a folder", hint="give a text file or a JSONL file")
        found = None if path is not None else _DATASET.fullmatch(name)
        if path is not None:
            texts = self._of_file(path, column, rows)
        elif found is not None:
            data = _open_dataset(name, found)
            places = range(0, len(data), max(1, len(data) // max(rows, 1)))
            numbered = ((f"row {place} of {name}", data[place]) for place in places)
            texts = self._of_rows(name, numbered, found["column"])
        else:
            raise UsageError(
                f"the file {name} is missing",
                hint="check the path; a data set is owner/name, and more exactly "
                "owner/name/configuration@split#column",
            )
        documents = [as_unicode(text) for text in texts]
        if not as_one(documents).strip():
            raise UsageError(f"{name} has no text", hint="give a file with text, or leave it out")
        return documents

    def _of_file(self, path: Path, column: str | None, rows: int) -> list[str]:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from error
        if content.startswith(_PARQUET):
            return self._of_rows(str(path), _parquet_rows(path, column, rows), column)
        text, note = decode(_unpacked(content, path), path)
        self.notes += [note] if note else []
        suffixes = [part.lower() for part in path.suffixes if part.lower() not in _PACKED_SUFFIXES]
        kind = suffixes[-1] if suffixes else ""
        if kind == _ARRAY and (numbered := _array_rows(text, path)) is not None:
            return self._of_rows(str(path), numbered, column)
        if kind in (_ARRAY, *_LINES):
            return self._of_rows(str(path), _lines(text, path), column)
        return [text]

    def _of_rows(
        self, name: str, rows: Iterator[tuple[str, object]], column: str | None
    ) -> list[str]:
        """Texts of rows, given with their places."""
        texts, chats, plain, error = [], 0, 0, ""
        for place, row in rows:
            value = _value_of(row, place, column)
            if isinstance(value, str):
                texts.append(value)
                continue
            chats += 1
            try:
                texts.append(self.render(value) if self.render else contents_of(value))
            except Exception as failure:  # noqa: BLE001 a template is a program of strangers
                plain, error = plain + 1, " ".join(str(failure).split())
                texts.append(contents_of(value))
        if chats and self.render is None:
            self.notes.append(f"{name}: contents of messages are joined without a chat template")
        elif chats:
            self.notes.append(f"{name}: {chats - plain} conversations by the chat template")
        if plain:
            self.notes.append(
                f"{name}: {plain} conversations do not fit the chat template, and their contents "
                f"are joined without it: {error}"
            )
        return texts


def as_one(documents: Sequence[str]) -> str:
    """Documents as one text."""
    return "\n\n".join(documents)


def hold_out(documents: Sequence[str], part: float, random: Random) -> tuple[str, str]:
    """Divide documents into text to learn from and text that is held out.

    Whole documents are held out, equal ones together; where none are about as long as is wanted,
    as of one long text, the end of all is held out.

    Args:
        documents: The documents.
        part: Part of the text that is held out, in (0, 1), at most.
        random: Which documents are held out.
    """
    sizes: Counter[str] = Counter()
    for document in documents:
        sizes[document] += len(document)
    wanted = part * sizes.total()
    held: Counter[str] = Counter()
    for document in random.sample([*sizes], len(sizes)):
        if held.total() + sizes[document] <= wanted:
            held[document] = sizes[document]
    if held.total() >= wanted / 2:
        learned = [document for document in documents if document not in held]
        return as_one(learned), as_one([*held])
    text = as_one(documents)
    end = len(text) - math.ceil(part * len(text))
    return text[:end], text[end:]


def find_file(name: str) -> tuple[Path | None, str | None]:
    """The file that a source names, and the column after `#`, if any; None for no file."""
    for text, column in ((name, None), name.rpartition("#")[::2]):
        try:
            path = Path(text).expanduser()
            if text and path.exists():
                return path, column
        except (OSError, ValueError, RuntimeError):  # too long, a zero byte, or no such home
            continue
    return None, None


def as_unicode(text: str) -> str:
    """A text without halves of characters (lone surrogates), which no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def contents_of(chat: Chat) -> str:
    """Contents of a conversation without a template, with the calls of tools as JSON."""
    parts = []
    for message in chat:
        parts += [message["content"]] if message["content"] else []
        parts += [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join(parts)


def _value_of(row: object, place: str, column: str | None) -> str | Chat:
    """Text or conversation of a row."""
    if isinstance(row, str) and column is None:
        return row
    names = (column,) if column else _COLUMNS
    values = [row[name] for name in names if name in row] if isinstance(row, Mapping) else []
    value = values[0] if values else None
    if isinstance(value, str):
        return value
    chat = [_message(one) for one in value] if isinstance(value, list) else []
    if chat and all(chat):
        return [message for message in chat if message is not None]
    keys = ", ".join(map(str, row)) if isinstance(row, Mapping) else ""
    raise UsageError(
        f"{place} has no text" + (f" in {column}" if column else ""),
        hint='expected an object with the key "text", or "messages" that have a "content" each'
        + (f"; another column is named after the file: FILE#COLUMN, of {keys}" if keys else ""),
    )


def _message(value: object) -> dict[str, Any] | None:
    """A message in the form of chat templates; None if it has nothing to say."""
    if not isinstance(value, Mapping):
        return None
    content = value.get("content", value.get("value"))
    calls = value.get("tool_calls") or ()
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        content = "\n".join(part for part in parts if isinstance(part, str))
    silent = not calls and not value.keys() & {"content", "value"}
    if silent or not isinstance(content, str | None):
        return None
    role = str(value.get("role", value.get("from", "user")))
    others = {key: own for key, own in value.items() if key not in ("from", "value")}
    return {**others, "role": _ROLES.get(role, role), "content": content or ""}


def _lines(text: str, path: Path) -> Iterator[tuple[str, object]]:
    """Rows of JSON lines; blank ones are left out."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"line {number} of {path}"
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError):
                raise UsageError(
                    f"{place} is not JSON", hint="a JSONL file has one JSON object per line"
                ) from None


def _array_rows(text: str, path: Path) -> Iterator[tuple[str, object]] | None:
    """Rows of a JSON array, or a single one; None where the file has JSON lines after all."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    rows = value if isinstance(value, list) else [value]
    return ((f"row {number} of {path}", row) for number, row in enumerate(rows, start=1))


def _parquet_rows(path: Path, column: str | None, rows: int) -> Iterator[tuple[str, object]]:
    """Evenly spread rows of a parquet file."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UsageError(
            f"{path} is a parquet file, and the package that reads it is not installed",
            hint="pip install pyarrow",
        ) from None
    try:
        with ParquetFile(path) as file:
            names = [column] if column else [n for n in file.schema_arrow.names if n in _COLUMNS]
            step = max(1, file.metadata.num_rows // max(rows, 1))
            first = 0
            for batch in file.iter_batches(batch_size=1024, columns=names or None):
                for place in range(-first % step, batch.num_rows, step):
                    yield f"row {first + place} of {path}", batch.slice(place, 1).to_pylist()[0]
                first += batch.num_rows
    except (ArrowException, OSError) as error:
        raise UsageError(f"{path} cannot be read: {error}", hint="fetch the file again") from error


def _unpacked(content: bytes, path: Path) -> bytes:
    """The content of a file that may be compressed."""
    damaged: tuple[type[Exception], ...] = (
        OSError,
        EOFError,
        ValueError,
        lzma.LZMAError,
        zlib.error,
    )
    unpack = next((own for magic, own in _PACKED.items() if content.startswith(magic)), None)
    if content.startswith(_ZSTD):
        try:
            from zstandard import ZstdError, decompress
        except ImportError:
            raise UsageError(
                f"{path} is compressed with zstd, and the package that reads it is not installed",
                hint=f"pip install zstandard, or: zstd -d {path}",
            ) from None
        unpack, damaged = decompress, (ZstdError,)
    try:
        return unpack(content) if unpack else content
    except damaged as error:
        raise UsageError(
            f"{path} cannot be decompressed: {error}", hint="fetch the file again"
        ) from error


def _open_dataset(name: str, found: re.Match[str]) -> Any:  # noqa: ANN401
    """A split of a data set of the local cache."""
    data, configuration, split = found["name"], found["configuration"], found["split"] or "train"
    fetch = f"datasets.load_dataset({data!r}, {configuration!r}, split={split!r})"
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"{name} is not a file, and the package that reads data sets is not installed",
            hint="check the path; for a data set, owner/name/configuration@split#column, run: "
            "pip install datasets",
        ) from None
    datasets.config.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(data, configuration, split=split)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{name} is neither a file nor a data set in the local cache",
            hint=f"check the path, or fetch the data set once, in Python: {fetch}",
        ) from error

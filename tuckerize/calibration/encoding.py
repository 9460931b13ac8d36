"""Encoding of a text file, by its byte order mark or its bytes."""

from __future__ import annotations

import codecs
from pathlib import Path

from tuckerize.errors import UsageError

# The longer marks first: that of UTF-32 begins like that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_SAMPLE = 1 << 16
# In a European text few characters are beyond ASCII; in other single-byte encodings most are.
_MOST_BEYOND_ASCII = 0.25


def decode(content: bytes, path: Path) -> tuple[str, str]:
    """Text of a file, and a note on its encoding, empty for UTF-8.

    Args:
        content: The bytes.
        path: The file, for messages.

    Raises:
        UsageError: It is not text, or in an encoding that cannot be told.
    """
    mark = next((mark for mark in _MARKS if content.startswith(mark)), None)
    name = _MARKS[mark] if mark else _guessed(content[:_SAMPLE])
    try:
        text = content.decode(name)
    except UnicodeDecodeError as error:
        if name == "utf-8" and _is_european(content):
            text = content.decode("cp1252", "replace")
            return text, f"{path} is not UTF-8: it was read as Windows-1252 (Latin-1)"
        raise UsageError(
            f"{path} is not text in UTF-8, UTF-16 or Latin-1: byte {error.start} cannot be read",
            hint="convert it, naming its encoding: "
            f"iconv -f ENCODING -t UTF-8 {path} > utf-8.txt (iconv -l lists them)",
        ) from None
    if "\0" in text[:_SAMPLE]:
        raise UsageError(
            f"{path} is not a text: it has zero bytes", hint="give a text, JSONL or parquet file"
        )
    return text, "" if name.startswith("utf-8") else f"{path} was read as {name.upper()}"


def _guessed(sample: bytes) -> str:
    """Encoding of a text without a mark: every other byte of ASCII in UTF-16 is zero."""
    half = len(sample) // 2
    for place, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        zeros, others = sample[place::2].count(0), sample[1 - place :: 2].count(0)
        if half and zeros > 0.4 * half and not others:
            return name
    return "utf-8"


def _is_european(content: bytes) -> bool:
    beyond = sum(byte >= 0x80 for byte in content[:_SAMPLE])
    return beyond <= _MOST_BEYOND_ASCII * min(len(content), _SAMPLE) and b"\0" not in content

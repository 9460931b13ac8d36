"""Texts as people have them: encodings, packings, rows and conversations give the same words."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from tuckerize.calibration.documents import Reader, as_one, as_unicode, find_file, hold_out
from tuckerize.calibration.encoding import decode
from tuckerize.calibration.text import TextSource, parse_source
from tuckerize.errors import UsageError

WORDS = "3 4 5 café naïve 6 7 8"
ROWS: list[dict[str, Any]] = [{"text": f"{n} {n + 1}"} for n in range(6)]
ALL = "\n\n".join(row["text"] for row in ROWS)
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CHAT = [{"role": "user", "content": "3 4"}, {"role": "assistant", "content": "5 6"}]


def read(path: Path | str, reader: Reader | None = None, rows: int = 1000) -> str:
    return as_one((reader or Reader()).read(str(path), rows=rows))


@pytest.mark.parametrize(
    ("encoding", "note"),
    [
        ("utf-8", ""),
        ("utf-8-sig", ""),
        ("utf-16", "was read as UTF-16"),
        ("utf-16-le", "was read as UTF-16-LE"),
        ("utf-16-be", "was read as UTF-16-BE"),
        ("utf-32", "was read as UTF-32"),
        ("latin-1", "is not UTF-8: it was read as Windows-1252 (Latin-1)"),
    ],
)
def test_text_of_any_usual_encoding_is_read_and_told(
    encoding: str, note: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(WORDS.encode(encoding))
    reader = Reader()
    assert read(path, reader) == WORDS
    assert [text.removeprefix(f"{path} ") for text in reader.notes] == ([note] if note else [])


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0\ufeff"), min_size=1))
def test_text_in_utf_8_is_itself_whatever_it_looks_like(text: str) -> None:
    for encoding in ("utf-8", "utf-8-sig"):
        assert decode(text.encode(encoding), Path("a.txt")) == (text, "")


def test_remedy_for_another_encoding_works(tmp_path: Path) -> None:
    path, text = tmp_path / "a.txt", "天地玄黄宇宙洪荒"
    path.write_bytes(text.encode("gb18030"))
    with pytest.raises(UsageError) as caught:
        read(path)
    command = caught.value.hint.partition(": ")[2].partition(" (")[0]
    command = command.replace("ENCODING", "GB18030")
    subprocess.run(["bash", "-c", command], check=True, cwd=tmp_path)
    assert read(tmp_path / "utf-8.txt") == text


@pytest.mark.parametrize(
    ("name", "pack"),
    [("gz", gzip.compress), ("zst", zstandard.compress), ("zst.txt", zstandard.compress)],
)
def test_compressed_text_and_lines_are_read(
    name: str, pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    plain, lines = tmp_path / f"a.txt.{name}", tmp_path / "ROWS.JSONL.gz"
    plain.write_bytes(pack(WORDS.encode()))
    lines.write_bytes(pack(LINES.encode()))
    assert read(plain) == WORDS
    assert read(lines) == ALL


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.json", json.dumps([row["text"] for row in ROWS])),
        ("a.json", LINES),
        ("A.JSONL", LINES),
        ("a.ndjson", LINES.replace("\n", "\r\n \n")),
    ],
)
def test_rows_of_every_kind_of_json_are_read(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert read(path) == ALL


def test_parquet_gives_rows_from_all_of_it_and_the_column_that_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = {"content": [f"c{n}" for n in range(3000)], "text": [str(n) for n in range(3000)]}
    parquet.write_table(pa.table(table), path)
    assert read(path, rows=10**6) == "\n\n".join(table["text"])
    assert read(path, rows=3).split() == ["0", "1000", "2000"]
    assert read(f"{path}#content", rows=3).split() == ["c0", "c1000", "c2000"]
    for source in (f"{path}#absent", path.with_suffix(".jsonl")):
        path.with_suffix(".jsonl").write_text('{"body": "1"}')
        with pytest.raises(UsageError, match="has no text"):
            read(source)


def test_column_of_a_file_with_rows_may_be_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "1", "body": "2"}')
    assert read(f"{path}#body") == "2"
    with pytest.raises(UsageError, match=r"line 1 of .* has no text in other") as caught:
        read(f"{path}#other")
    assert "FILE#COLUMN, of text, body" in caught.value.hint


@pytest.mark.parametrize(
    ("row", "text", "rendered"),
    [
        ({"messages": CHAT}, "3 4\n5 6", "<user> 3 4 <assistant> 5 6"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "3"}, {}]}]},
            "3",
            "<user> 3",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
                    {"role": "tool", "content": "7"},
                ]
            },
            '{"id": "1"}\n7',
            "<assistant>  calls 1 <tool> 7",
        ),
        (
            {"conversations": [{"from": "human", "value": "3"}, {"from": "gpt", "value": "4"}]},
            "3\n4",
            "<user> 3 <assistant> 4",
        ),
    ],
)
def test_conversations_of_every_kind_are_joined_or_rendered(
    row: dict[str, Any], text: str, rendered: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    reader = Reader()
    assert read(path, reader) == text
    assert reader.notes == [f"{path}: contents of messages are joined without a chat template"]

    def render(chat: list[dict[str, Any]]) -> str:
        calls = [f" calls {len(m['tool_calls'])}" if "tool_calls" in m else "" for m in chat]
        words = [f"<{m['role']}> {m['content']}" for m in chat]
        return " ".join(map("".join, zip(words, calls, strict=True)))

    reader = Reader(render)
    assert read(path, reader) == rendered
    assert reader.notes == [f"{path}: 1 conversations by the chat template"]


def test_conversation_that_a_template_refuses_is_joined_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps({"messages": CHAT}), json.dumps({"messages": CHAT[:1]})]))

    def strict(chat: list[dict[str, Any]]) -> str:
        if len(chat) < 2:
            raise ValueError("roles must alternate")
        return "rendered"

    reader = Reader(strict)
    assert read(path, reader) == "rendered\n\n3 4"
    assert "1 conversations do not fit the chat template" in reader.notes[1]
    assert "roles must alternate" in reader.notes[1]


@given(st.text(st.characters(codec=None)))
def test_no_text_keeps_half_a_character(text: str) -> None:
    whole = as_unicode(text)
    whole.encode()
    assert whole == text or "\ufffd" in whole or "\ud83d" in text


def test_pair_of_halves_is_one_character_and_a_lone_one_is_replaced() -> None:
    assert as_unicode("a\ud83d\ude00b\ud83dc") == "a\U0001f600b\ufffdc"


def test_name_of_a_file_may_have_a_colon_or_a_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("log:2024").write_text("1")
    Path("a#b").write_text("2")
    assert parse_source("log:2024") == TextSource("log:2024")
    assert parse_source("log:2024:0.5") == TextSource("log:2024", 0.5)
    assert parse_source("a#b:2") == TextSource("a#b", 2.0)
    assert find_file("a#b") == (Path("a#b"), None)


@pytest.mark.parametrize("name", ["~nobody-of-this-name/a", "/" + "x" * 300, "a\0b", "#text"])
def test_name_that_no_file_can_have_is_missing(name: str) -> None:
    with pytest.raises(UsageError, match="is missing"):
        read(name)


@given(
    st.lists(st.text("abc ", min_size=1, max_size=20), min_size=1, max_size=40),
    st.floats(0.01, 0.5),
    st.integers(0, 9),
)
def test_no_document_is_both_learned_and_held_out(
    documents: list[str], part: float, seed: int
) -> None:
    learned, held = hold_out(documents, part, Random(seed))
    assert (learned, held) == hold_out(documents, part, Random(seed))
    whole = as_one(documents)
    if learned + held == whole:  # too few documents: the end
        assert len(held) == math.ceil(part * len(whole))
        return
    theirs = set(held.split("\n\n"))
    assert sum(len(own) for own in documents if own in theirs) <= part * sum(map(len, documents))
    assert as_one([own for own in documents if own not in theirs]) == learned


def test_a_part_of_many_documents_is_held_out_and_the_end_of_one() -> None:
    rows = [f"row {number}" for number in range(1000)]
    learned, held = hold_out(rows, 1 / 16, Random(0))
    assert set(learned.split("\n\n")) | set(held.split("\n\n")) == set(rows)
    assert not set(learned.split("\n\n")) & set(held.split("\n\n"))
    assert 1 / 18 < len(held.split("\n\n")) / 1000 < 1 / 14
    assert hold_out(rows, 1 / 16, Random(1)) != (learned, held)
    assert hold_out(["x" * 64, "a"], 1 / 16, Random(0)) == ("x" * 62, "xx\n\na")

"""Sources of text become the windows that were asked for, or a message says what is less."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tuckerize.calibration.text import (
    TextSource,
    Windows,
    fingerprint,
    parse_source,
    read_split_windows,
    read_windows,
    share,
)
from tuckerize.errors import CheckpointError, UsageError

BEGIN = 1000
WEIGHTS = st.floats(1e-6, 1e6)


def save_tokenizer(folder: Path, *, begin: bool) -> Path:
    """A tokenizer whose word `n` is the token n; unknown words are the token 1001."""
    words = {str(number): number for number in range(BEGIN)}
    own = Tokenizer(models.WordLevel({**words, "<s>": BEGIN, "?": BEGIN + 1}, unk_token="?"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begin:
        own.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BEGIN)]
        )
    saved = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=own, bos_token="<s>"
    )
    saved.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "plain", begin=False)


@pytest.fixture(scope="module")
def tokenizer_with_begin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "begin", begin=True)


def numbers(path: Path, count: int, first: int = 0) -> TextSource:
    """A file with the tokens first, first + 1, …"""
    path.write_text(" ".join(str(first + n) for n in range(count)))
    return TextSource(str(path))


def read(
    sources: Sequence[TextSource], folder: Path, tokens: int = 40, window: int = 10, seed: int = 0
) -> Windows:
    return read_windows(sources, folder, tokens=tokens, window=window, seed=seed)


@given(st.text(min_size=1).filter(lambda name: ":" not in name), WEIGHTS)
def test_source_is_parsed_with_and_without_weight(name: str, weight: float) -> None:
    assert parse_source(name) == TextSource(name)
    assert parse_source(f"{name}:{weight!r}") == TextSource(name, weight)
    assert parse_source(f"disk:{name}:{weight!r}") == TextSource(f"disk:{name}", weight)


def test_colon_without_a_number_belongs_to_the_name() -> None:
    assert parse_source("c:notes") == TextSource("c:notes")


@pytest.mark.parametrize("text", ["", ":1", "a.txt:0", "a.txt:-1", "a.txt:nan", "a.txt:inf"])
def test_source_without_name_or_positive_weight_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="positive weight") as caught:
        parse_source(text)
    assert repr(text) in caught.value.message
    assert "PATH:WEIGHT" in caught.value.hint


@given(st.integers(0, 10_000), st.lists(WEIGHTS, min_size=1, max_size=6))
def test_shares_add_up_and_are_next_to_exact(count: int, weights: list[float]) -> None:
    shares = share(count, weights)
    assert sum(shares) == count
    for own, weight in zip(shares, weights, strict=True):
        assert abs(own - count * weight / sum(weights)) < 1 + 1e-6


def test_shares_of_extreme_weights_add_up() -> None:
    assert share(7, [1e308, 1e308, 1e-308]) == [4, 3, 0]


def test_windows_are_consecutive_disjoint_and_spread(tokenizer: Path, tmp_path: Path) -> None:
    rows = read([numbers(tmp_path / "a.txt", 200)], tokenizer).tokens_SL
    assert rows.shape == (4, 10)
    assert rows.dtype == torch.int64
    assert torch.equal(rows, rows[:, :1] + torch.arange(10))
    for part, row in enumerate(rows):
        assert 50 * part <= row[0]
        assert row[-1] < 50 * (part + 1)


@pytest.mark.parametrize(("part", "windows"), [(0.0, 0), (0.25, 10), (0.3, 12), (0.99, 39)])
def test_last_windows_are_of_random_tokens(
    part: float, windows: int, tokenizer_with_begin: Path, tmp_path: Path
) -> None:
    def rows_of(seed: int) -> Tensor:
        source = numbers(tmp_path / "a.txt", 500)
        folder = tokenizer_with_begin
        found = read_windows([source], folder, tokens=400, window=10, seed=seed, random_share=part)
        assert found.text == 40 - windows
        return found.tokens_SL

    rows = rows_of(0)
    assert rows.shape == (40, 10)
    begin = int(rows[0, 0])
    assert bool((rows[:, 0] == begin).all())
    steps = (rows[:, 2:] - rows[:, 1:-1] == 1).all(dim=1)
    assert steps.tolist() == [True] * (40 - windows) + [False] * windows
    ordinary = rows[40 - windows :, 1:]
    assert bool((ordinary != begin).all())
    if windows:
        assert len(set(ordinary.flatten().tolist())) > 0.6 * windows * 9
        assert torch.equal(rows, rows_of(0))
        assert not torch.equal(rows, rows_of(1))


def test_text_that_just_suffices_is_used_whole(tokenizer: Path, tmp_path: Path) -> None:
    found = read([numbers(tmp_path / "a.txt", 40)], tokenizer)
    assert torch.equal(found.tokens_SL.flatten(), torch.arange(40))
    assert found.messages == ()


def test_seed_alone_decides_where_windows_begin(tokenizer: Path, tmp_path: Path) -> None:
    source = numbers(tmp_path / "a.txt", 900)
    one, again, other = (read([source], tokenizer, seed=seed).tokens_SL for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_windows_of_a_long_text_come_from_all_of_it(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(" ".join(str(n // 100) for n in range(100_000)))
    rows = read([TextSource(str(path))], tokenizer, tokens=100).tokens_SL
    assert rows.shape == (10, 10)
    starts = rows[:, 5]
    assert torch.equal(starts, starts.sort().values)
    assert starts[0] < 150
    assert starts[-1] > 850


def test_begin_token_is_the_first_of_every_window(
    tokenizer_with_begin: Path, tmp_path: Path
) -> None:
    rows = read([numbers(tmp_path / "a.txt", 200)], tokenizer_with_begin).tokens_SL
    assert rows.shape == (4, 10)
    assert (rows[:, 0] == BEGIN).all()
    assert (rows[:, 1:] < BEGIN).all()


def test_sources_share_the_windows_by_weight(tokenizer: Path, tmp_path: Path) -> None:
    one = TextSource(numbers(tmp_path / "a.txt", 300).name, 3)
    other = TextSource(numbers(tmp_path / "b.txt", 300, first=500).name, 1)
    rows = read([one, other], tokenizer, tokens=80).tokens_SL
    assert (rows[:6] < 500).all()
    assert (rows[6:] >= 500).all()
    assert len(rows) == 8


def test_short_source_gives_what_it_has_and_is_named(tokenizer: Path, tmp_path: Path) -> None:
    short, long = numbers(tmp_path / "a.txt", 15), numbers(tmp_path / "b.txt", 300)
    found = read([short, long], tokenizer)
    assert len(found.tokens_SL) == 3
    assert found.messages == (f"{short.name} gives 10 tokens of its share of 20",)


def test_text_shorter_than_a_window_makes_shorter_windows(
    tokenizer_with_begin: Path, tmp_path: Path
) -> None:
    source = numbers(tmp_path / "a.txt", 6)
    found = read([source], tokenizer_with_begin, tokens=10)
    assert found.tokens_SL.tolist() == [[BEGIN, 0, 1, 2, 3, 4, 5]]
    assert found.messages == (
        "windows have 7 tokens: no text fills 10",
        f"{source.name} gives 7 tokens of its share of 10",
    )


@pytest.mark.parametrize(("tokens", "window"), [(9, 10), (10, 1), (0, 0)])
def test_less_than_one_window_is_refused(tokenizer: Path, tokens: int, window: int) -> None:
    with pytest.raises(UsageError, match="not one window"):
        read([TextSource("unread.txt")], tokenizer, tokens, window)


def test_sources_that_give_no_token_are_refused(tokenizer: Path) -> None:
    with pytest.raises(UsageError, match="no text"):
        read([], tokenizer)


def test_jsonl_gives_texts_and_messages(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    chat = [{"role": "user", "content": "3 4"}, {"role": "assistant", "content": "5 6"}]
    lines = [{"text": "0 1 2", "other": 9}, {"messages": chat}, {"text": "7 8 9"}]
    path.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    rows = read([TextSource(str(path))], tokenizer, tokens=10).tokens_SL
    assert rows.tolist() == [list(range(10))]


BAD_LINES = ["7", "{}", '{"text": 7}', '{"messages": []}', '{"messages": [{"role": "user"}]}', "{"]


@pytest.mark.parametrize("line", BAD_LINES)
def test_jsonl_line_without_text_is_named(tokenizer: Path, tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "1"}}\n\n{line}\n')
    with pytest.raises(UsageError, match=r"line 3 of .*a\.jsonl (has no text|is not JSON)"):
        read([TextSource(str(path))], tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b" \n", "has no text"),
        (b"\0\0\0\1", "has zero bytes"),
        ("天地玄黄宇宙洪荒".encode("gb18030"), "is not text in UTF-8, UTF-16 or Latin-1: byte 0"),
        (b"\x1f\x8bno", "cannot be decompressed"),
        (b"PAR1no", "cannot be read"),
    ],
)
def test_unusable_file_is_named(
    tokenizer: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read([TextSource(str(path))], tokenizer)
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_folder_is_not_a_source(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        read([TextSource(str(tmp_path))], tokenizer)


@pytest.mark.parametrize("name", ["missing.txt", "a/b.jsonl", "/a/b", "./b", "~/b", "a/b/c/d"])
def test_missing_file_is_named(tokenizer: Path, name: str) -> None:
    with pytest.raises(UsageError, match=f"the file {name} is missing"):
        read([TextSource(name)], tokenizer)


def test_data_set_without_the_package_is_refused(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="us/words is not a file") as caught:
        read([TextSource("us/words")], tokenizer)
    assert "pip install datasets" in caught.value.hint


def install_datasets(monkeypatch: pytest.MonkeyPatch, known: dict[Any, Any]) -> SimpleNamespace:
    """A stand-in for the package, which is optional."""

    def load_dataset(name: str, configuration: str | None, *, split: str) -> Any:  # noqa: ANN401
        if (name, configuration, split) not in known:
            raise ConnectionError(name)
        return known[name, configuration, split]

    package = SimpleNamespace(config=SimpleNamespace(), load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", package)
    return package


def test_data_set_of_the_cache_is_read_offline(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"{number} " * 9} for number in range(900)]
    package = install_datasets(monkeypatch, {("us/words", "en", "train"): rows})
    found = read([TextSource("us/words/en")], tokenizer, tokens=40, window=20).tokens_SL
    assert package.config.HF_HUB_OFFLINE is True
    assert found.shape == (2, 20)
    assert set(found.flatten().tolist()) <= {0, 180, 360, 540, 720}


def test_data_set_that_is_not_there_is_named(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_datasets(monkeypatch, {})
    with pytest.raises(UsageError, match="us/words is neither a file nor a data set") as caught:
        read([TextSource("us/words")], tokenizer)
    assert "load_dataset('us/words', None, split='train')" in caught.value.hint


def test_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        read([numbers(tmp_path / "a.txt", 100)], tmp_path)


def test_fingerprint_depends_on_tokens_and_windows() -> None:
    tokens = torch.arange(12).reshape(3, 4)
    assert fingerprint(tokens) == fingerprint(tokens.clone().T.contiguous().T)
    others = [tokens.reshape(4, 3), tokens + 1, tokens[:2]]
    assert fingerprint(tokens) not in {fingerprint(other) for other in others}


def split(source: TextSource, folder: Path, seed: int = 0) -> tuple[Windows, Windows]:
    return read_split_windows([source], folder, tokens=320, window=10, seed=seed, held_out=1 / 8)


def test_held_out_windows_are_of_other_documents(tokenizer: Path, tmp_path: Path) -> None:
    """Row n holds the tokens 20 n, 20 n + 1, …"""
    path = tmp_path / "rows.jsonl"
    rows = [" ".join(str(n) for n in range(first, first + 20)) for first in range(100, 740, 20)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    for seed in range(5):
        learned, held = split(TextSource(str(path)), tokenizer, seed)
        assert held.tokens_SL.shape == (4, 10)
        assert learned.tokens_SL.shape == (28, 10)
        ours, theirs = ({*(own.tokens_SL // 20).flatten().tolist()} for own in (learned, held))
        assert not ours & theirs
        again = split(TextSource(str(path)), tokenizer, seed)
        assert fingerprint(again[1].tokens_SL) == fingerprint(held.tokens_SL)


def test_end_of_a_single_document_is_held_out(tokenizer: Path, tmp_path: Path) -> None:
    source = numbers(tmp_path / "a.txt", 700, first=100)
    learned, held = split(source, tokenizer)
    assert held.tokens_SL.min() > learned.tokens_SL.max()
    short = numbers(tmp_path / "b.txt", 64, first=100)
    with pytest.raises(UsageError, match="is 8 tokens, and a window has 10") as caught:
        split(short, tokenizer)
    assert caught.value.hint == "use a longer text, or --window 8"
    assert len(read_split_windows(
        [short], tokenizer, tokens=320, window=8, seed=0, held_out=1 / 8
    )[1].tokens_SL) == 1  # fmt: skip
    with pytest.raises(UsageError, match="is 1 tokens, and a window has 2") as caught:
        split(numbers(tmp_path / "c.txt", 2), tokenizer)
    assert caught.value.hint == "use a longer text"

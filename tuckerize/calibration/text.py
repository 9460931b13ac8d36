"""Windows of tokens from files of text; nothing is ever downloaded.

Letters at the end of tensor names: S windows, L tokens of a window.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tuckerize.calibration.documents import Reader, as_one, find_file, hold_out
from tuckerize.calibration.tokenizer import check_tokens, load_tokenizer, renderer
from tuckerize.errors import UsageError

# Upper bounds on input: 16 characters per wanted token, one data-set row per 8 tokens.
_CHARACTERS_PER_TOKEN = 16
_TOKENS_PER_ROW = 8


@dataclass(frozen=True, slots=True)
class TextSource:
    """One source of text.

    Attributes:
        name: A file, FILE#COLUMN, or a data set of the local cache: owner/name, and more exactly
            owner/name/configuration@split#column; its split is `train` by default.
        weight: Its share of the tokens, relative to the other sources.
    """

    name: str
    weight: float = 1.0


class Windows(NamedTuple):
    """Windows of tokens.

    Attributes:
        tokens_SL: The tokens, shape (S, L), int64.
        text: Number of windows of text; they are the first, random tokens follow.
        messages: Shortfalls from the request, for the user.
    """

    tokens_SL: Tensor
    text: int
    messages: tuple[str, ...]


def parse_source(text: str) -> TextSource:
    """A source as a user types it: `PATH` or `PATH:WEIGHT`; the name of a file is no weight.

    Raises:
        UsageError: There is no path, or the weight is not a positive number.

    Examples:
        >>> parse_source("a.txt:0.7")
        TextSource(name='a.txt', weight=0.7)
    """
    name, colon, last = text.rpartition(":")
    try:
        weight = float(last) if colon else 1.0
    except ValueError:  # the colon belongs to the name
        return TextSource(text)
    if colon and find_file(text)[0] is not None:
        return TextSource(text)
    name = name if colon else text
    if not name or not 0 < weight < math.inf:
        raise UsageError(
            f"{text!r} is not a source of text with a positive weight",
            hint="give PATH or PATH:WEIGHT, as in notes.txt:0.7",
        )
    return TextSource(name, weight)


def read_windows(
    sources: Sequence[TextSource],
    tokenizer_folder: Path,
    *,
    tokens: int,
    window: int,
    seed: int,
    random_share: float = 0.0,
    vocabulary: int | None = None,
    chat_template: bool = True,
) -> Windows:
    """Windows of tokens, shared between sources by their weights and evenly spread over each.

    A window begins with the tokenizer's begin token, where the tokenizer adds one. A source that is
    too short gives what it has; if all are shorter than a window, windows are shorter. The last
    windows are of random tokens, which belong to no domain; their share is of the windows that
    there are.

    Args:
        sources: Where the text comes from.
        tokenizer_folder: Folder of the model.
        tokens: Number of tokens in all windows together, rounded down to whole windows.
        window: Number of tokens per window.
        seed: Where in its part of the text each window begins, and which tokens are random.
        random_share: Part of the windows that are of random tokens, in [0, 1).
        vocabulary: Number of embeddings of the model; not checked by default.
        chat_template: Whether conversations are rendered by the tokenizer's chat template, if it
            has one.

    Raises:
        CheckpointError: The folder has no tokenizer, or one of another vocabulary.
        UsageError: A source cannot be read, or there is not one window.
    """
    cutter = _Cutter.of(tokenizer_folder, sources, vocabulary, seed)
    documents, notes = cutter.read(tokens, window, chat_template=chat_template)
    texts = [as_one(own) for own in documents]
    found = cutter.cut(texts, tokens // window, window, random_share)
    return found._replace(messages=(*notes, *found.messages))


def read_split_windows(
    sources: Sequence[TextSource],
    tokenizer_folder: Path,
    *,
    tokens: int,
    window: int,
    seed: int,
    held_out: float,
    vocabulary: int | None = None,
    chat_template: bool = True,
) -> tuple[Windows, Windows]:
    """Windows to learn from, and windows of other documents, of which nothing is learned.

    Args:
        sources: As in `read_windows`, and so are the others.
        tokenizer_folder: Folder of the model.
        tokens: Number of tokens in all windows together.
        window: Number of tokens per window.
        seed: Which documents are held out, and where windows begin.
        held_out: Part of every source that is held out, in (0, 1).
        vocabulary: Number of embeddings of the model.
        chat_template: Whether conversations are rendered by the tokenizer's chat template.

    Raises:
        CheckpointError: The folder has no tokenizer, or one of another vocabulary.
        UsageError: A source cannot be read, or what is held out is less than a window.
    """
    cutter = _Cutter.of(tokenizer_folder, sources, vocabulary, seed)
    documents, notes = cutter.read(tokens, window, chat_template=chat_template)
    texts = [hold_out(own, held_out, Random(seed)) for own in documents]
    fewer = max(1, int(held_out * (tokens // window)))
    learned = cutter.cut([own for own, _ in texts], tokens // window - fewer, window)
    width = learned.tokens_SL.shape[1]
    held = cutter.cut([own for _, own in texts], fewer, width)
    if (longest := held.tokens_SL.shape[1]) < max(width, 2):
        raise UsageError(
            f"the text is too short: of it {held_out:.1%} are held out, which is {longest} tokens, "
            f"and a window has {max(width, 2)}",
            hint="use a longer text" + (f", or --window {longest}" if longest > 1 else ""),
        )
    return learned._replace(messages=(*notes, *learned.messages)), held


def share(count: int, weights: Sequence[float]) -> list[int]:
    """Share a number of things by weights, by largest remainder.

    Examples:
        >>> share(10, [0.5, 0.25, 0.25])
        [5, 3, 2]
    """
    largest = max(weights, default=1.0)
    total = math.fsum(weight / largest for weight in weights)
    exact = [count * (weight / largest) / total for weight in weights]
    shares = [int(part) for part in exact]
    by_remainder = sorted(range(len(weights)), key=lambda place: shares[place] - exact[place])
    for place in by_remainder[: count - sum(shares)]:
        shares[place] += 1
    return shares


def fingerprint(tokens_SL: Tensor) -> str:
    """SHA-256 of windows: equal for equal tokens in equal windows, on any machine."""
    digest = hashlib.sha256(repr(tuple(tokens_SL.shape)).encode())
    digest.update(tokens_SL.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Cutter:
    """Cuts windows from the texts of some sources.

    Attributes:
        folder: Folder of the tokenizer.
        tokenizer: The tokenizer.
        sources: The sources.
        vocabulary: Number of embeddings of the model; None if it is not checked.
        seed: Where windows begin, and which tokens are random.
    """

    folder: Path
    tokenizer: Any
    sources: Sequence[TextSource]
    vocabulary: int | None
    seed: int

    @classmethod
    def of(
        cls, folder: Path, sources: Sequence[TextSource], vocabulary: int | None, seed: int
    ) -> _Cutter:
        """One with the tokenizer of a model."""
        return cls(folder, load_tokenizer(folder), sources, vocabulary, seed)

    def read(
        self, tokens: int, window: int, *, chat_template: bool
    ) -> tuple[list[list[str]], list[str]]:
        """Documents of every source that so many tokens may need, and notes for the user."""
        if not 2 <= window <= tokens:
            raise UsageError(
                f"{tokens} tokens in windows of {window} are not one window of at least 2 tokens",
                hint="ask for at least as many tokens as a window has",
            )
        reader = Reader(renderer(self.tokenizer) if chat_template else None)
        documents = [
            reader.read(source.name, rows=max(count, 1) * window // _TOKENS_PER_ROW)
            for source, count in zip(self.sources, self._shares(tokens // window), strict=True)
        ]
        return documents, reader.notes

    def cut(
        self, texts: Sequence[str], count: int, window: int, random_share: float = 0.0
    ) -> Windows:
        """At most so many windows, a part of them of random tokens."""
        begin, random = self._begin(), Random(self.seed)
        randoms = int(random_share * count)
        shares = self._shares(count - randoms)
        streams = []
        for text, own in zip(texts, shares, strict=True):
            excerpts = _excerpts(text, own, window * _CHARACTERS_PER_TOKEN, random)
            streams.append([self._tokenize(excerpt) for excerpt in excerpts])
        longest = max((len(stream) for own in streams for stream in own), default=0)
        if not longest:
            raise UsageError("there is no text to take windows from", hint="give a file with text")
        length = min(window - len(begin), longest)
        taken = [
            _take(stream, own, length, random) for stream, own in zip(streams, shares, strict=True)
        ]
        width = len(begin) + length
        messages = [f"windows have {width} tokens: no text fills {window}"] * (width < window)
        messages += [
            f"{source.name} gives {len(found) * width} tokens of its share of {own * window}"
            for source, found, own in zip(self.sources, taken, shares, strict=True)
            if len(found) * width < own * window
        ]
        text_rows = [row for own in taken for row in own]
        randoms = randoms * len(text_rows) // max(sum(shares), 1)  # of the text that there is
        ordinary = self._ordinary() if randoms else []
        random_rows = [random.choices(ordinary, k=length) for _ in range(randoms)]
        rows = [begin + row for row in text_rows + random_rows]
        tokens_SL = torch.tensor(rows, dtype=torch.int64)
        if self.vocabulary is not None:
            check_tokens(int(tokens_SL.max()), self.vocabulary, self.folder)
        return Windows(tokens_SL, len(text_rows), tuple(messages))

    def _shares(self, count: int) -> list[int]:
        """Windows of every source."""
        return share(count, [source.weight for source in self.sources])

    def _tokenize(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _begin(self) -> list[int]:
        """The begin token, if one is added."""
        begin = self.tokenizer.bos_token_id
        added = begin is not None and self.tokenizer("")["input_ids"][:1] == [begin]
        return [begin] if added else []

    def _ordinary(self) -> list[int]:
        """Tokens of texts: added ones may lie beyond the embeddings, special ones are in none."""
        known = self.tokenizer.vocab_size
        known = min(known, self.vocabulary or known)
        return sorted(set(range(known)) - set(self.tokenizer.all_special_ids))


def _starts(length: int, size: int, count: int, random: Random) -> Iterator[int]:
    """Begins of spans that do not overlap, one anywhere in each of `count` equal parts."""
    for part in range(count):
        first = part * length // count
        room = (part + 1) * length // count - size - first
        yield first + int(random.random() * (room + 1))


def _excerpts(text: str, count: int, size: int, random: Random) -> list[str]:
    """The text, or as many excerpts of it as there are windows if those are less."""
    if len(text) <= count * size:
        return [text]
    return [text[start : start + size] for start in _starts(len(text), size, count, random)]


def _take(streams: list[list[int]], count: int, length: int, random: Random) -> list[list[int]]:
    """Windows of one source: `count` of one stream, or one of each of `count` streams."""
    windows = []
    for stream in streams:
        own = min(count // len(streams), len(stream) // length)
        starts = _starts(len(stream), length, own, random)
        windows += [stream[start : start + length] for start in starts]
    return windows

"""Windows of tokens from files of text; nothing is ever downloaded.

Letters at the end of tensor names: S windows, L tokens of a window.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from tuckerize.calibration.documents import Reader, find_file
from tuckerize.calibration.tokenizer import check_tokens, load_tokenizer, renderer
from tuckerize.errors import UsageError

Tokenize = Callable[[str], list[int]]

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


@dataclass(frozen=True, slots=True)
class Windows:
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
    if not 2 <= window <= tokens:
        raise UsageError(
            f"{tokens} tokens in windows of {window} are not one window of at least 2 tokens",
            hint="ask for at least as many tokens as a window has",
        )
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenize, begin, ordinary = _parts_of(tokenizer, vocabulary)
    reader = Reader(renderer(tokenizer) if chat_template else None)
    random = Random(seed)
    randoms = int(random_share * (tokens // window))
    shares = share(tokens // window - randoms, [source.weight for source in sources])
    streams = []
    for source, count in zip(sources, shares, strict=True):
        text = reader.read(source.name, rows=max(count, 1) * window // _TOKENS_PER_ROW)
        excerpts = _excerpts(text, count, window * _CHARACTERS_PER_TOKEN, random)
        streams.append([tokenize(excerpt) for excerpt in excerpts])
    longest = max((len(stream) for own in streams for stream in own), default=0)
    if not longest:
        raise UsageError("there is no text to take windows from", hint="give a file with text")
    length = min(window - len(begin), longest)
    taken = [_take(own, count, length, random) for own, count in zip(streams, shares, strict=True)]
    width = len(begin) + length
    messages = list(reader.notes)
    messages += [f"windows have {width} tokens: no text fills {window}"] if width < window else []
    messages += [
        f"{source.name} gives {len(own) * width} tokens of its share of {count * window}"
        for source, own, count in zip(sources, taken, shares, strict=True)
        if len(own) * width < count * window
    ]
    text_rows = [row for own in taken for row in own]
    randoms = randoms * len(text_rows) // max(sum(shares), 1)  # of the text that there is
    random_rows = [random.choices(ordinary, k=length) for _ in range(randoms)]
    rows = [begin + row for row in text_rows + random_rows]
    tokens_SL = torch.tensor(rows, dtype=torch.int64)
    if vocabulary is not None:
        check_tokens(int(tokens_SL.max()), vocabulary, tokenizer_folder)
    return Windows(tokens_SL, len(text_rows), tuple(messages))


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


def _parts_of(
    tokenizer: Any,  # noqa: ANN401
    vocabulary: int | None,
) -> tuple[Tokenize, list[int], list[int]]:
    """Function of a tokenizer, the begin token if one is added, and all ordinary tokens."""

    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    begin = tokenizer.bos_token_id
    added = begin is not None and tokenizer("")["input_ids"][:1] == [begin]
    # Added tokens may lie beyond the embeddings, and special ones never stand in a text.
    known = min(tokenizer.vocab_size, vocabulary or tokenizer.vocab_size)
    ordinary = sorted(set(range(known)) - set(tokenizer.all_special_ids))
    return tokenize, [begin] if added else [], ordinary


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

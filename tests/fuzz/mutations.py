"""Mutations of files: bytes of any, values of JSON ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

ODD: list[Any] = [
    None, True, "", "x", "\ud800", "../a", "a\0b", "model.safetensors", "deepseek_v2", "BF16",
    0, -1, 1, 2, 2**31, 2**63, 10**400, 1e308, 0.5, float("nan"), float("inf"), [], {}, [[]],
    [1] * 50, {"a": {"a": {}}}, [None], ["model.safetensors"], "9" * 5000,
]  # fmt: skip

odd_values = st.sampled_from(ODD) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=5,
)


def places_in(value: Any) -> Iterator[tuple[Any, Any]]:  # noqa: ANN401
    """Every container of a JSON value with each of its keys."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places_in(value[key])


@st.composite
def mutated_json(draw: st.DrawFn, content: bytes) -> bytes:
    """A JSON file of which one value to four were replaced, removed or copied elsewhere."""
    value = copy.deepcopy(json.loads(content))
    for _ in range(draw(st.integers(1, 4))):
        places = list(places_in(value)) if isinstance(value, dict | list) else []
        if not places:
            break
        owner, key = draw(st.sampled_from(places))
        match draw(st.sampled_from(["replace", "remove", "copy"])):
            case "replace":
                owner[key] = copy.deepcopy(draw(odd_values))
            case "remove":
                del owner[key]
            case _:
                other, place = draw(st.sampled_from(places))
                if place in other if isinstance(other, dict) else place < len(other):
                    owner[key] = copy.deepcopy(other[place])
    return json.dumps(value).encode()


@st.composite
def mutated_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """A file of which one part to four were flipped, cut out, repeated or replaced."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        stop = draw(st.integers(start, min(len(content), start + 64)))
        match draw(st.sampled_from(["flip", "cut", "repeat", "replace", "truncate"])):
            case "flip" if start < len(content):
                bit = bytes([content[start] ^ 1 << draw(st.integers(0, 7))])
                content = content[:start] + bit + content[start + 1 :]
            case "cut":
                content = content[:start] + content[stop:]
            case "repeat":
                content = content[:stop] + content[start:]
            case "truncate":
                content = content[:start]
            case _:
                content = content[:start] + draw(st.binary(max_size=16)) + content[stop:]
    return content


def mutated(content: bytes) -> st.SearchStrategy[bytes]:
    """A file, mutated as JSON where it is JSON, or as bytes."""
    try:
        json.loads(content)
    except ValueError:
        return mutated_bytes(content)
    return mutated_json(content) | mutated_bytes(content)

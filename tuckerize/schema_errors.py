"""Explanations of pydantic's errors: which key, its value, and the values that are allowed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from tuckerize.errors import did_you_mean

Place = tuple[int | str, ...]
"""Keys and indices that lead to a value."""

_SHOWN = 60  # characters of a value in a message


class Explanation(NamedTuple):
    """Message and hint for the user; the hint is empty where the message suffices."""

    message: str
    hint: str


def explain(
    error: ValidationError,
    model: type[BaseModel],
    value: object,
    name: Callable[[Place], str],
    *,
    example: str,
) -> Explanation:
    """The first fault of a value that does not follow a model's schema.

    Args:
        error: The error that pydantic raised.
        model: The model.
        value: The value that was validated.
        name: Name of a place for the user; empty for the whole value.
        example: A small value that is valid, as text.
    """
    found = error.errors(include_url=False)
    # An unknown key often explains why another is missing.
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    place, kind = first["loc"], first["type"]
    schema = model.model_json_schema()
    called = name(place)
    if kind == "extra_forbidden":
        return _unknown_key(schema, place, name(place[:-1]))
    if kind == "missing":
        return Explanation(f"{called} is missing", f"write, for example:\n{example}")
    if kind == "value_error":
        text = str(first.get("ctx", {}).get("error", first["msg"]))
        return Explanation(f"{called}: {text}" if called else text, "")
    if kind == "invalid_key":
        return Explanation(f"{called} is not a key: keys are text", "")
    node, given = _node(schema, place), _at(value, place, first["input"])
    if kind == "too_short":
        return Explanation(f"{called} is empty, expected at least one", "")
    return Explanation(f"{called} {_shown(given)} is not {_words(node)}", _hint(node, given))


def _unknown_key(schema: dict[str, Any], place: Place, owner: str) -> Explanation:
    key = str(place[-1])
    keys = list(_node(schema, place[:-1]).get("properties", {}))
    message = f"{owner + ': ' if owner else ''}'{_cut(key)}' is not a key"
    for other, node in schema["properties"].items():
        inner = _resolved(schema, node)
        below = _resolved(schema, inner["items"]) if "items" in inner else inner
        if place[:1] != (other,) and key in below.get("properties", {}):
            line = f"  - {key}: ..." if "items" in inner else f"  {key}: ..."
            return Explanation(message + " here", f"it belongs to {other}:\n{other}:\n{line}")
    return Explanation(message, f"{did_you_mean(key, keys)}the keys are: {', '.join(keys)}")


def _hint(node: dict[str, Any], given: object) -> str:
    if "enum" in node and isinstance(given, str):
        return did_you_mean(given, node["enum"]).strip()
    if node.get("type") == "number":
        return _hint_for_number(node, given)
    number = _number(given)
    if number is None:
        return ""
    return f"write it in quotes: '{given}'" if node.get("type") == "string" else ""


def _hint_for_number(node: dict[str, Any], given: object) -> str:
    """A hint for a share that is written as a percentage or with a decimal comma."""
    if node.get("maximum", node.get("exclusiveMaximum")) != 1:
        return ""
    number = _number(str(given).replace(",", ".").removesuffix("%"))
    if number is None or number <= 0:
        return "write a share, such as 0.75"
    if number < 1:
        return f"did you mean {number:g}?"
    return f"did you mean {number / 100:g} ({number:g} %)?" if 2 <= number <= 100 else ""


def _number(value: object) -> float | None:
    try:
        return float(str(value))
    except ValueError:
        return None


def _words(node: dict[str, Any]) -> str:
    """Description of the values that a schema allows."""
    if "enum" in node:
        names = [str(value) for value in node["enum"]]
        return f"one of: {', '.join(names)}" if len(names) > 1 else f"'{names[0]}'"
    if "const" in node:
        return repr(node["const"])
    kinds = {
        "integer": "a whole number",
        "number": "a number",
        "boolean": "true or false",
        "string": "text",
        "array": "a list",
        "object": "a set of keys and values",
    }
    bounds = [
        f"{words} {node[key]:g}"
        for key, words in (
            ("exclusiveMinimum", "above"),
            ("minimum", "of at least"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "below"),
        )
        if key in node
    ]
    return f"{kinds.get(node.get('type', ''), 'possible')} {' and '.join(bounds)}".strip()


def _node(schema: dict[str, Any], place: Place) -> dict[str, Any]:
    """The part of a JSON schema that describes the value at a place."""
    node = schema
    for part in place:
        inner = node.get("items") if isinstance(part, int) else node.get("properties", {}).get(part)
        node = _resolved(schema, inner or {})
    return node


def _resolved(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """A node without references, and without the alternative that it is absent."""
    for choice in node.get("anyOf", ()):
        if choice.get("type") != "null":
            return _resolved(schema, choice)
    if "$ref" in node:
        found: dict[str, Any] = schema["$defs"][node["$ref"].rpartition("/")[2]]
        return found
    return node


def _at(value: object, place: Place, default: object) -> object:
    """The value at a place as it was given, before anything converted it."""
    inner: Any = value
    for part in place:
        index = isinstance(part, int) and isinstance(inner, list | tuple)
        if not index and not (isinstance(inner, Mapping) and part in inner):
            return default
        inner = inner[part]
    return inner


def _shown(value: object) -> str:
    if isinstance(value, dict | list | tuple):
        return "(a list)" if isinstance(value, list | tuple) else "(keys and values)"
    return "(empty)" if value is None else _cut(value if isinstance(value, str) else repr(value))


def _cut(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _SHOWN else f"{flat[:_SHOWN]}..."

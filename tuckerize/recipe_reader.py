"""Recipes as they are given: read from a file, keys and values, or options, and validated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tuckerize.errors import RecipeError, UsageError
from tuckerize.recipe import Recipe
from tuckerize.recipe_files import (
    Texts,
    choose_document,
    find_recipe,
    list_of_texts,
    read_documents,
)
from tuckerize.schema_errors import Place, explain

_MOST_VALUES = 10_000
_EXAMPLE = "rules:\n  - keep: 0.75"


def recipe_of_options(
    recipe: str | Path | Mapping[str, Any] | None,
    *,
    sizes: Mapping[str, object],
    where: Mapping[str, object],
    how: Mapping[str, object],
) -> Recipe:
    """The recipe from a file, or from options; exactly one of them says the size.

    Args:
        recipe: A YAML file, the name of a shipped recipe, or its keys and values.
        sizes: Options of a rule's size: rank, keep, bits, tolerance. None stands for not given.
        where: Options of the stacks that a rule applies to: layers, projections.
        how: Options that are keys of a recipe; `calibration` may be a text, or several.

    Raises:
        UsageError: No size is given, or options exclude each other.
        RecipeError: The recipe cannot be read, or a value is not possible.
    """
    given = [name for name, value in {**sizes, "recipe": recipe}.items() if value is not None]
    if len(given) != 1:
        raise UsageError(
            "no size was given" if not given else f"--{' and --'.join(given)} exclude each other",
            hint="give exactly one of:\n"
            "  --keep 0.75             keep 75 % of the routed parameters\n"
            "  --bits 3.1              bits per routed weight, everything counted\n"
            "  --rank full,full,75%    core sizes of experts, intermediate, hidden\n"
            "  --tolerance 0.1         relative residual that each stack may have\n"
            "or --recipe FILE, which says it for each range of layers",
        )
    if recipe is not None:
        others = {name: value for name, value in how.items() if name != "calibration"}
        also = [name for name, value in {**where, **others}.items() if value is not None]
        if also:
            raise UsageError(
                f"--{also[0].replace('_', '-')} and --recipe exclude each other",
                hint=f"write {also[0]} into "
                + ("the recipe" if isinstance(recipe, Mapping) else str(recipe)),
            )
        text: Any = how.get("calibration")
        if isinstance(recipe, Mapping):
            place = "the recipe"
            return parse_recipe(choose_document([recipe], text, place=place), place=place)
        return read_recipe(find_recipe(str(recipe)), text)
    rule = {name: value for name, value in {**sizes, **where}.items() if value is not None}
    if isinstance(rule.get("projections"), str):
        rule["projections"] = [part.strip() for part in str(rule["projections"]).split(",")]
    settings = {name: value for name, value in how.items() if value is not None}
    texts = settings.get("calibration")
    if isinstance(texts, str | Path | Sequence):
        settings["calibration"] = {"texts": list_of_texts(texts)}
    return _validated({"rules": [rule], **settings}, _option_of, place="")


def read_recipe(path: Path, calibration: Texts | Mapping[str, Any] | None = None) -> Recipe:
    """Read and validate a recipe file.

    Args:
        path: The file.
        calibration: Text or several, or keys of a calibration, where the file leaves them open.

    Raises:
        RecipeError: The file cannot be read, is not YAML, or does not follow the schema.
        UsageError: The file says itself what is given here.
    """
    value = choose_document(read_documents(path), calibration, place=str(path))
    return parse_recipe(value, place=str(path))


def parse_recipe(value: object, *, place: str) -> Recipe:
    """Validate a recipe.

    Args:
        value: Values as read from YAML or given by options.
        place: Where they come from, for messages.

    Raises:
        RecipeError: They do not follow the schema; the message names the first key that does not.
    """
    if value is None:
        raise RecipeError(f"{place} is empty", hint=f"write, for example:\n{_EXAMPLE}")
    if not isinstance(value, Mapping):
        raise RecipeError(
            f"{place} holds {_kind(value)}, expected keys and values",
            hint=f"write, for example:\n{_EXAMPLE}",
        )
    _check_extent(value, place)
    return _validated(dict(value), _key_of, place=f"{place}: ")


def _check_extent(value: object, place: str) -> None:
    """Refuse what is far larger than a recipe: YAML's aliases multiply, and may hold themselves."""
    queue, seen = [value], 0
    while queue:
        part = queue.pop()
        seen += 1
        if isinstance(part, Mapping):
            queue += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple | set):
            queue += part
        if seen > _MOST_VALUES or len(queue) > _MOST_VALUES:
            raise RecipeError(
                f"{place} has more than {_MOST_VALUES} values",
                hint="a recipe has a few rules; check its aliases (*name), which repeat a value",
            )
        if isinstance(part, int) and part.bit_length() > 63:
            raise RecipeError(f"{place} has a number of {part.bit_length()} bits: it is too large")
        if isinstance(part, str) and part.encode(errors="ignore").decode() != part:
            raise RecipeError(f"{place} has text with half a character (a lone surrogate)")


def _validated(value: dict[str, Any], name: Callable[[Place], str], *, place: str) -> Recipe:
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        message, hint = explain(error, Recipe, value, name, example=_EXAMPLE)
        raise RecipeError(f"{place}{message}", hint=hint) from None


def _key_of(place: Place) -> str:
    """`rules[0].keep`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return "".join(parts).removeprefix(".")


def _option_of(place: Place) -> str:
    """`--keep`: the option that gave a value."""
    words = [part for part in place if isinstance(part, str)]
    if words[:1] == ["rules"]:
        words = words[1:]
    if words[:1] != ["calibration"] or len(words) == 1:
        return f"--{words[0].replace('_', '-')}" if words else ""
    options = {
        "texts": "--calibration",
        "tokens": "--calibration-tokens",
        "chat_template": "--no-chat-template",
    }
    if words[1] in options:
        return options[words[1]]
    is_option = words[1] in ("random_share", "multiple", "target", "refine")
    return f"--{words[1].replace('_', '-')}" if is_option else ".".join(words)


def _kind(value: object) -> str:
    return "a list" if isinstance(value, list) else repr(value)

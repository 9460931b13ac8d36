"""Recipe files: YAML on disk, and the recipes that are shipped.

A file holds one recipe, or one for each target, as YAML documents; options give what it leaves
open of the calibration. Beside a shipped recipe lies the
published configuration of its model, with the sizes that a plan gives.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tuckerize.errors import RecipeError, UsageError

Texts = str | Path | Sequence[str | Path]
"""One source of text or several: a text or JSONL file or a data set, as PATH or PATH:WEIGHT."""


def list_of_texts(texts: Texts) -> list[str]:
    """Sources of text as a list, each as a user types it."""
    if isinstance(texts, str | Path):
        return [str(texts)]
    return [str(text) for text in texts]


@dataclass(frozen=True, slots=True)
class ShippedRecipe:
    """A recipe that is shipped.

    Attributes:
        name: Its name, as `--recipe` takes it.
        text: The YAML.
        published: What is known of its model: `model`, `source`, `config`, `plan`; empty for a
            recipe of an example.
    """

    name: str
    text: str
    published: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> ShippedRecipe:
        """Read a YAML file, and what is published of its model."""
        beside = path.with_suffix(".json")
        published = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
        return cls(path.stem, path.read_text(encoding="utf-8"), published)


def shipped_recipes() -> dict[str, Path]:
    """Files of the shipped recipes, by name."""
    package = Path(__file__).parent
    # In a wheel the recipes lie in the package, in a checkout beside it.
    folders = (package / "recipes", package.parent / "recipes")
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """A recipe file: a path, or the name of a shipped one (`deepseek-v2-lite`).

    Raises:
        RecipeError: There is neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name not in shipped:
        raise RecipeError(
            f"there is no recipe file {name}, and no shipped recipe of that name",
            hint="give a YAML file, or one of those that 'tuckerize recipes list' names",
        )
    return shipped[name]


def read_documents(path: Path) -> list[Any]:
    """The YAML documents of a recipe file, one for each target; never empty.

    Raises:
        RecipeError: The file cannot be read or is not YAML.
    """
    try:
        return list(yaml.safe_load_all(path.read_text(encoding="utf-8"))) or [None]
    except OSError as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(
            f"the recipe {path} is not YAML: {' '.join(str(error).split())}",
            hint="indent with spaces" if "'\\t'" in str(error) else "",
        ) from None


def choose_document(
    documents: Sequence[Any], calibration: Texts | Mapping[str, Any] | None, *, place: str
) -> Any:  # noqa: ANN401
    """The recipe for a target, with the calibration text that it leaves to the user.

    Args:
        documents: Recipes as read, one for each target.
        calibration: Text or several, or keys of a calibration, which the recipe must leave open;
            None for the first recipe as it is.
        place: Where the recipes come from, for messages.

    Raises:
        RecipeError: There is none for the target, or its text is missing.
        UsageError: The recipe says itself what is given here.
    """
    if calibration is None:
        given: dict[str, Any] = {}
    elif isinstance(calibration, Mapping):
        given = dict(calibration)
    else:
        given = {"texts": list_of_texts(calibration)}
    by_target: dict[Any, Any] = {}
    for value in documents:
        by_target.setdefault(_calibration_of(value).get("target"), value)
    target = given.get("target")
    value = documents[0] if target is None else by_target.get(target, by_target.get(None))
    own = _calibration_of(value)
    if value is None and target is not None:
        raise RecipeError(
            f"{place} has no recipe for the target {target}",
            hint=f"leave --target out, or choose one of: {', '.join(map(str, by_target))}",
        )
    open_keys = {key: found for key, found in given.items() if own.get(key) != found}
    for key in open_keys:
        if key in own:
            option = {"texts": "calibration", "tokens": "calibration-tokens"}.get(key, key)
            raise UsageError(
                f"--{option.replace('_', '-')} and --recipe exclude each other",
                hint=f"leave it out, or change {key} in the calibration of {place}",
            )
    if given and isinstance(value, Mapping):
        return {**value, "calibration": {**own, **given}}
    if own and "texts" not in own:
        raise RecipeError(
            f"{place} calibrates, and leaves the text to you",
            hint="add --calibration FILE with a text like those the model is used for",
        )
    return value


def _calibration_of(value: object) -> Mapping[str, Any]:
    """The calibration of a recipe as read; empty if it has none."""
    own = value.get("calibration") if isinstance(value, Mapping) else None
    return own if isinstance(own, Mapping) else {}

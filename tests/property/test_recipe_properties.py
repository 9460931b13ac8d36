"""Recipes: what is valid is read, and everything else is a RecipeError."""

from __future__ import annotations

import copy
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tuckerize.domain import StackShape
from tuckerize.errors import RecipeError
from tuckerize.recipe import Recipe
from tuckerize.recipe_reader import parse_recipe, read_recipe
from tuckerize.recipe_text import resolve_rank, select_layers

VALID: dict[str, Any] = {
    "schema_version": 1,
    "rules": [
        {"layers": "1-3,7", "projections": ["down_proj", "up_proj"], "rank": "full,50%,16"},
        {"layers": "20-", "keep": 0.5},
        {"tolerance": 0.1},
    ],
    "group_size": 8,
    "joint": "gate_up",
    "dtype": "bfloat16",
    "max_sweeps": 3,
    "engine": "tuckerize",
}

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.text("0123456789,-%.full ", max_size=12)
    | st.dates()
    | st.binary(max_size=4)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=4)
    ),
    max_leaves=8,
)


def places(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values inside a value."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


@st.composite
def mutations(draw: st.DrawFn) -> Any:  # noqa: ANN401
    """A valid recipe with some places replaced, removed, doubled or given new keys."""
    recipe: Any = copy.deepcopy(VALID)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(places(recipe)))
        if not place:
            if draw(st.integers(0, 9)) == 0:
                return draw(values)
            continue
        parent = recipe
        for key in place[:-1]:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "replace":
            parent[place[-1]] = draw(values)
        elif action == "remove":
            del parent[place[-1]]
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=6) | st.integers())] = draw(values)
        else:
            parent.append(draw(values))
    return recipe


PYDANTIC = re.compile(r"[Ii]nput should|[Ee]xtra inputs|[Ff]ield required|valid (tuple|dict|str)")


def parse_or_refuse(value: object) -> Recipe | None:
    try:
        return parse_recipe(value, place="here")
    except RecipeError:
        return None


@given(mutations())
def test_mutated_recipe_is_read_or_refused_with_a_recipe_error(value: object) -> None:
    recipe = parse_or_refuse(value)
    if recipe is not None:
        again = parse_recipe(recipe.model_dump(mode="json", exclude_none=True), place="again")
        assert again == recipe


@given(mutations())
def test_refusal_of_a_mutated_recipe_is_in_our_own_words(value: object) -> None:
    said = ""
    try:
        parse_recipe(value, place="here")
    except RecipeError as error:
        said = f"{error.message} {error.hint}"
    assert not PYDANTIC.search(said)


@given(mutations())
def test_mutated_recipe_that_is_read_can_be_applied_or_is_refused(value: object) -> None:
    recipe = parse_or_refuse(value)
    for rule in recipe.rules if recipe else ():
        if rule.rank is not None:
            assert all(size >= 1 for size in resolve_rank(rule.rank, StackShape(8, 24, 32)))
        try:
            assert set(select_layers(rule.layers, (1, 2, 3, 7))) <= {1, 2, 3, 7}
        except RecipeError:
            continue


@given(
    st.binary(max_size=60) | st.text("[]{}:,-&*!?|>'\"%@`#\n\t ab1.", max_size=60).map(str.encode)
)
def test_recipe_file_of_anything_is_refused_with_a_recipe_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(content)
        with pytest.raises(RecipeError, match=re.escape(str(path))):
            read_recipe(path)


@given(mutations())
def test_recipe_written_as_yaml_reads_like_its_values(value: object) -> None:
    expected = parse_or_refuse(value)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(value, allow_unicode=True), encoding="utf-8")
        try:
            read = read_recipe(path)
        except RecipeError:
            assert expected is None
        else:
            assert read == expected

"""The `recipes` commands: what is shipped for which model, and the sizes that it plans."""

from __future__ import annotations

from tuckerize.domain import StackShape
from tuckerize.recipe_files import ShippedRecipe, find_recipe, shipped_recipes
from tuckerize.report.plans import PlannedBytes, RecipeFacts, RecipesReport


def list_recipes() -> RecipesReport:
    """Name the shipped recipes, with the sizes that they plan from published configurations.

    Example:
        >>> "qwen3-30b-a3b" in [recipe.name for recipe in list_recipes().recipes]
        True
    """
    shipped = [ShippedRecipe.read(path) for path in shipped_recipes().values()]
    return RecipesReport(tuple(map(_facts, filter(lambda own: own.published, shipped))))


def show_recipe(name: str) -> str:
    """The YAML of a shipped recipe, or of a file.

    Raises:
        RecipeError: There is none of that name.
    """
    return ShippedRecipe.read(find_recipe(name)).text


def _facts(recipe: ShippedRecipe) -> RecipeFacts:
    plan = recipe.published["plan"]
    return RecipeFacts(
        name=recipe.name,
        model=recipe.published["model"],
        also=recipe.published.get("also", ""),
        layers=plan["layers"],
        shape=StackShape(*plan["shape"]),
        routed_parameters=plan["routed_parameters"],
        before=PlannedBytes(**plan["before"]),
        after={target: PlannedBytes(**own) for target, own in plan["after"].items()},
    )

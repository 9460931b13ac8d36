"""The commands `recipes list` and `recipes show`."""

from __future__ import annotations

from typing import Annotated

import typer

from tuckerize.cli import options
from tuckerize.cli.boundary import boundary
from tuckerize.cli.printing import write_out

recipes = typer.Typer(
    help="List and show the recipes that are shipped.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@recipes.command(name="list")
@boundary
def list_recipes(as_json: options.AsJson = False) -> None:
    """List the shipped recipes, with sizes before and after.

    Sizes are planned from the published configurations.

    Example: tuckerize recipes list
    """
    from tuckerize.cli.tables import show
    from tuckerize.pipeline.recipes import list_recipes as run

    show(run(), as_json=as_json)


@recipes.command(name="show")
@boundary
def show_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a shipped recipe.")],
) -> None:
    """Print a shipped recipe.

    Example: tuckerize recipes show qwen3-30b-a3b
    """
    from tuckerize.pipeline.recipes import show_recipe as run

    write_out(run(name))

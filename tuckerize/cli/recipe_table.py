"""The table of `recipes list`."""

from __future__ import annotations

from tuckerize.cli.printing import count_text, make_table, print_all, size_text
from tuckerize.report.plans import PlannedBytes, RecipesReport


def show_recipes(report: RecipesReport) -> None:
    """Print the shipped recipes with the sizes that they plan."""
    rows = []
    for recipe in report.recipes:
        smallest = min(recipe.after.values(), key=lambda own: own.total_bytes)
        rows.append(
            (
                recipe.name,
                ", ".join(recipe.after),
                f"{recipe.layers} x {' x '.join(map(str, recipe.shape))}",
                count_text(recipe.routed_parameters),
                _bytes(recipe.before),
                _bytes(smallest),
            )
        )
    header = ("recipe", "targets", "layers x E x H x I", "routed", "before", "smallest after")
    print_all(
        make_table(header, rows, text_columns=2),
        "all bytes (bits per routed weight); 'tuckerize recipes show NAME' prints a recipe",
    )


def _bytes(sizes: PlannedBytes) -> str:
    return f"{size_text(sizes.total_bytes)} ({sizes.bits_per_weight:.1f})"

"""Options of the mesh that shards are for: their types, help texts and panel."""

from __future__ import annotations

from typing import Annotated

import typer

from tuckerize.domain import Layout

MESH = "Mesh of the shards"

Tp = Annotated[
    int, typer.Option(metavar="N", help="Tensor-parallel processes.", rich_help_panel=MESH)
]
Ep = Annotated[
    int, typer.Option(metavar="N", help="Expert-parallel processes.", rich_help_panel=MESH)
]
MeshTp = Annotated[
    int | None,
    typer.Option(
        "--tp",
        min=1,
        metavar="N",
        help="Tensor-parallel processes; with --ep, those of the shards that fit by default.",
        rich_help_panel=MESH,
    ),
]
MeshEp = Annotated[
    int | None,
    typer.Option(
        "--ep", min=1, metavar="N", help="Expert-parallel processes.", rich_help_panel=MESH
    ),
]
Cp = Annotated[
    int,
    typer.Option(min=1, metavar="N", help="Context-parallel processes.", rich_help_panel=MESH),
]
SequenceParallel = Annotated[
    bool,
    typer.Option(
        "--sequence-parallel",
        metavar="",
        help="Split tokens over the tensor-parallel processes.",
        rich_help_panel=MESH,
    ),
]


def _layout(text: str) -> str | None:
    if text == "auto":
        return None
    if text in tuple(Layout):
        return text
    raise typer.BadParameter(f"'{text}' is not one of: auto, {', '.join(Layout)}")


LayoutOption = Annotated[
    str | None,
    typer.Option(
        "--layout",
        parser=_layout,
        metavar=f"[auto|{'|'.join(Layout)}]",
        help="How tensors are split; auto, the default, compares bytes and traffic.",
        rich_help_panel=MESH,
    ),
]

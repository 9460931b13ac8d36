"""Options of `heal`."""

from __future__ import annotations

from typing import Annotated

import typer

from tuckerize.cli.mesh_options import MESH
from tuckerize.domain import Part

TRAINING = "Training"

Data = Annotated[
    list[str],
    typer.Option(
        metavar="FILE",
        help="Text or JSONL file, or data set in the cache. Repeat for a mixture; FILE:WEIGHT sets "
        "its share.",
    ),
]
Train = Annotated[
    str | None,
    typer.Option(
        metavar="PARTS",
        help=f"Of {','.join(Part)}; cores, factors and scales by default.",
        rich_help_panel=TRAINING,
    ),
]
Teacher = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Dense model whose predictions are learned too; it is read layer by layer.",
        rich_help_panel=TRAINING,
    ),
]
TeacherShare = Annotated[
    float,
    typer.Option(
        metavar="SHARE",
        help="Share of the KL divergence to the teacher in the loss.",
        rich_help_panel=TRAINING,
    ),
]
Tokens = Annotated[
    int,
    typer.Option(
        min=2,
        metavar="N",
        help="Tokens to train on; a shorter text is read several times.",
        rich_help_panel=TRAINING,
    ),
]
Window = Annotated[
    int,
    typer.Option(min=2, metavar="N", help="Tokens of a window.", rich_help_panel=TRAINING),
]
Batch = Annotated[
    int,
    typer.Option(
        min=1, metavar="N", help="Windows per step, of all processes.", rich_help_panel=TRAINING
    ),
]
AtOnce = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        help="Windows per forward of a process; gradients of a step are accumulated.",
        rich_help_panel=TRAINING,
    ),
]
LearningRate = Annotated[
    float,
    typer.Option(
        metavar="RATE",
        help="Largest step of a value, relative to the root mean square of its tensor.",
        rich_help_panel=TRAINING,
    ),
]
Recompute = Annotated[
    bool,
    typer.Option(
        "--recompute",
        metavar="",
        help="Compute activations again in the backward, to save memory.",
        rich_help_panel=TRAINING,
    ),
]
Seed = Annotated[
    int,
    typer.Option(metavar="N", help="Seed of the order of the text.", rich_help_panel=TRAINING),
]
TrainingTp = Annotated[
    int,
    typer.Option(
        "--tp",
        min=1,
        metavar="N",
        help="Tensor-parallel processes, for which there are shards; the others are replicas.",
        rich_help_panel=MESH,
    ),
]
Fsdp = Annotated[
    bool,
    typer.Option(
        "--fsdp",
        metavar="",
        help="Split all parameters over the replicas, to save memory.",
        rich_help_panel=MESH,
    ),
]

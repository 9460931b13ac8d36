"""Options and arguments of the commands: their types, help texts and panels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuckerize.ascend.environment import MAX_CONNECT_TIMEOUT
from tuckerize.domain import CoreType, Device, Dtype, Engine, Joint, Mtp, Target

SIZE = "Size: exactly one"
STACKS = "What is decomposed"
CALIBRATION = "Calibration"
FIT = "What fits"
WHERE = "Where it runs"
OUTPUT = "Output"

_MODEL = "Folder, Hugging Face id in the local cache, or short name such as DeepSeek-V2-Lite."
_SIZES = "E experts, H intermediate, I hidden"

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help=f"{_MODEL} Also a Tucker checkpoint.")
]
Model = Annotated[str, typer.Option(metavar="MODEL", help=_MODEL)]
FoldedModel = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL)]
Download = Annotated[
    bool,
    typer.Option(
        "--download", metavar="", help="Fetch MODEL from the Hugging Face Hub if it is not here."
    ),
]
TuckerFolder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Tucker checkpoint that decompose wrote.")
]
SourceModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="Source model; by default the one that decompose was given.",
    ),
]

# Size
Keep = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE",
        help="Kept share of the routed parameters: 0.75 or 75%.",
        rich_help_panel=SIZE,
    ),
]
KeptLatent = Annotated[
    str,
    typer.Option(
        "--keep",
        metavar="SHARE",
        help="Kept share of the latent space, in multiples of 8: 0.75 or 75%.",
    ),
]
Bits = Annotated[
    float | None,
    typer.Option(
        metavar="BITS",
        help="Bits per routed weight of the dense model, scales and factors counted: 3.1. Chooses "
        "the encoding of the cores, without --quantize.",
        rich_help_panel=SIZE,
    ),
]
PlanBits = Annotated[
    float | None,
    typer.Option(
        "--bits", metavar="BITS", help="Bits per routed weight; sizes from 14 to 1.5 by default."
    ),
]
Rank = Annotated[
    str | None,
    typer.Option(
        metavar="R_E,R_H,R_I",
        help=f"Core sizes ({_SIZES}): sizes, percentages, or 'full', as in full,full,75%.",
        rich_help_panel=SIZE,
    ),
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        metavar="RESIDUAL",
        help="Relative residual that each stack may have.",
        rich_help_panel=SIZE,
    ),
]
RecipeFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="YAML file with rules for layers and projections, or name of a shipped recipe.",
        rich_help_panel=SIZE,
    ),
]

# What is decomposed
Layers = Annotated[
    str | None,
    typer.Option(
        metavar="LAYERS",
        help="Layers like 1-3,7,20-; all MoE layers by default.",
        rich_help_panel=STACKS,
    ),
]
Projections = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="Of gate_proj, up_proj and down_proj, with commas; all by default.",
        rich_help_panel=STACKS,
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Experts that share a decomposition; all of a layer by default.",
        rich_help_panel=STACKS,
    ),
]
JointOption = Annotated[
    Joint | None,
    typer.Option("--joint", help="One U_I for gate_proj and up_proj.", rich_help_panel=STACKS),
]
StoredDtype = Annotated[
    Dtype | None,
    typer.Option(
        "--dtype",
        help="Type of stored factors; the source's by default.",
        rich_help_panel=STACKS,
    ),
]
Quantize = Annotated[
    CoreType | None,
    typer.Option(
        "--quantize",
        help="Cores in 8 bits (int8 or float8) with a scale per output, or in 4 or 3 bits with one "
        "per 32 or 128 inputs.",
        rich_help_panel=STACKS,
    ),
]
DequantizeRest = Annotated[
    bool | None,
    typer.Option(
        "--dequantize-rest",
        help="Write what is not compressed dense, in --dtype, where the source has it quantized.",
        rich_help_panel=STACKS,
    ),
]
MtpOption = Annotated[
    Mtp | None,
    typer.Option(
        "--mtp",
        help="Leave layers that predict further tokens as they are.",
        rich_help_panel=STACKS,
    ),
]
Cores = Annotated[
    CoreType,
    typer.Option(
        "--cores",
        help="4 or 3 bits with a scale per 32 or 128 inputs, or 8 bits (int8 or float8) with one "
        "per output.",
    ),
]
MaxSweeps = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="HOOI sweeps after the start, at most; 10 by default.",
        rich_help_panel=STACKS,
    ),
]
EngineOption = Annotated[
    Engine | None,
    typer.Option(
        "--engine",
        help="Implementation of HOOI; tensorly is the slow reference.",
        rich_help_panel=STACKS,
    ),
]

# Calibration
_TEXTS = typer.Option(
    "--calibration",
    metavar="FILE",
    help="Text or JSONL file, or data set in the cache. Repeat for a mixture; FILE:WEIGHT sets "
    "its share.",
    rich_help_panel=CALIBRATION,
)
Calibration = Annotated[list[str] | None, _TEXTS]
CalibrationTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Tokens of all texts together; 65536 by default.",
        rich_help_panel=CALIBRATION,
    ),
]
RandomShare = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=0.99,
        metavar="SHARE",
        help="Share of random tokens, to protect abilities that the text does not cover; 0.5 by "
        "default.",
        rich_help_panel=CALIBRATION,
    ),
]
Multiple = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Truncated sizes of a calibrated --keep are multiples of this.",
        rich_help_panel=CALIBRATION,
    ),
]
_NO_CHAT_TEMPLATE = "Join the contents of conversations, without the tokenizer's chat template."
NoChatTemplate = Annotated[
    bool,
    typer.Option(
        "--no-chat-template", metavar="", help=_NO_CHAT_TEMPLATE, rich_help_panel=CALIBRATION
    ),
]
TargetOption = Annotated[
    Target | None,
    typer.Option(
        "--target",
        help="Engines that it is made for: any-engine, fused-kernels, or free.",
        rich_help_panel=CALIBRATION,
    ),
]
_ALL = "all"


def _targets(text: str) -> str:
    if text in (*Target, _ALL):
        return text
    raise typer.BadParameter(f"'{text}' is not one of: {', '.join(Target)}, {_ALL}")


PlanTarget = Annotated[
    str | None,
    typer.Option(
        "--target",
        parser=_targets,
        metavar=f"[{'|'.join(Target)}|{_ALL}]",
        help="Engines that it is made for; all compares them.",
        rich_help_panel=CALIBRATION,
    ),
]
Refine = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="Gradient steps on each layer's output; 300 by default.",
        rich_help_panel=CALIBRATION,
    ),
]
PlainChats = Annotated[bool, typer.Option("--no-chat-template", help=_NO_CHAT_TEMPLATE)]
Text = Annotated[
    list[str],
    typer.Option(
        metavar="FILE",
        help="Text or JSONL file, or data set in the cache. Repeat for a mixture; FILE:WEIGHT sets "
        "its share.",
    ),
]

# Fit
Fit = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICES",
        help="Devices that shall serve it, as 4x32GiB: the most bits that fit, from headers alone. "
        "Replaces --bits.",
        rich_help_panel=FIT,
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Tokens of a sequence; 8192 by default.", rich_help_panel=FIT
    ),
]
Sequences = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Sequences that are served at the same time; 8 by default.",
        rich_help_panel=FIT,
    ),
]

# Where it runs
DeviceOption = Annotated[
    Device,
    typer.Option(
        "--device",
        help="Device that computes; auto takes the accelerator where there is one.",
        rich_help_panel=WHERE,
    ),
]
CollectiveTimeout = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="SECONDS",
        help="Time that a process waits for the others; "
        f"{MAX_CONNECT_TIMEOUT.total_seconds():.0f} on npu, else 86400.",
        rich_help_panel=WHERE,
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory that a process may take, as 16GiB: hidden states go to temporary files, "
        "experts are read again and again, fewer threads work, or it is refused; what is free by "
        "default.",
        rich_help_panel=WHERE,
    ),
]
ComputeDtype = Annotated[
    Dtype,
    typer.Option(
        "--dtype",
        help="Type to compute in; float32 detects the smallest faults.",
        rich_help_panel=WHERE,
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        metavar="",
        help="Give the same report bit for bit every time.",
        rich_help_panel=WHERE,
    ),
]

# Output
Output = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="New folder; not needed with --dry-run.",
        rich_help_panel=OUTPUT,
    ),
]
DenseOutput = Annotated[
    Path,
    typer.Option("--output", metavar="FOLDER", help="New folder.", rich_help_panel=OUTPUT),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        metavar="",
        help="Print the plan, write nothing; reads weights only to calibrate a budget.",
        rich_help_panel=OUTPUT,
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        metavar="",
        help="Begin anew: replace an earlier result, finished or not.",
        rich_help_panel=OUTPUT,
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the report as JSON.", rich_help_panel=OUTPUT)
]

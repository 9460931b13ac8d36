"""The commands. They import what they need when they run, so that `--help` is quick."""

from __future__ import annotations

import sys
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuckerize.ascend.environment import MAX_CONNECT_TIMEOUT
from tuckerize.cli.boundary import NO, boundary
from tuckerize.domain import Allocation, Device, Dtype, Engine, Joint, Layout, Truncation
from tuckerize.errors import OutputError, TuckerizeError, UsageError
from tuckerize.version import __version__

if TYPE_CHECKING:
    from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
    from tuckerize.moe.source import SourceModel
    from tuckerize.recipe import Recipe

app = typer.Typer(
    name="tuckerize",
    help="Make Mixture-of-Experts checkpoints smaller by Tucker decomposition, and verify them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class LayoutOption(StrEnum):
    """How shards are split."""

    AUTO = "auto"
    INTERMEDIATE = "intermediate"
    RANK = "rank"


_TEXTS = typer.Option(
    "--calibration",
    help="Text or JSONL file, or a data set; FILE:WEIGHT and several of them make a mix.",
)
Tokens = Annotated[
    int | None,
    typer.Option("--calibration-tokens", min=1, help="Tokens of all texts; 65536 by default."),
]
RandomShare = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=0.99,
        help="Part of the tokens that are random, against too narrow a text; 0.5 by default.",
    ),
]
ShapeChoice = Annotated[
    Truncation | None,
    typer.Option(help="What a calibrated --keep truncates; auto chooses for every layer."),
]
AllocateChoice = Annotated[
    Allocation | None,
    typer.Option(help="Share a calibrated --keep out by predicted error, or evenly."),
]
Multiple = Annotated[
    int | None,
    typer.Option(min=1, help="Truncated sizes of a calibrated --keep are multiples of this."),
]
EqualWidths = Annotated[
    bool | None,
    typer.Option(
        "--equal-widths",
        help="Experts of a layer keep equally many neurons, for kernels and layouts that need it.",
    ),
]
GroupSize = Annotated[
    int | None, typer.Option(help="Experts that share a decomposition; all by default.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")]
CollectiveTimeout = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Seconds that a process waits for the others; "
        f"{MAX_CONNECT_TIMEOUT.total_seconds():.0f} on npu, else 86400.",
    ),
]
DeviceOption = Annotated[Device, typer.Option(help="Where products run.")]
TuckerFolder = Annotated[Path, typer.Argument(help="A Tucker checkpoint, made by decompose.")]


def _version(wanted: bool) -> None:  # noqa: FBT001
    if wanted:
        sys.stdout.write(f"tuckerize {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command()
@boundary
def inspect(
    model: Annotated[
        str, typer.Argument(help="A folder, a Hugging Face id, or a short name; also a result.")
    ],
    as_json: AsJson = False,
) -> None:
    """Show what a MoE model is made of; reads headers and configuration only.

    Example: tuckerize inspect DeepSeek-V2-Lite
    """
    from tuckerize.checkpoint.hub import resolve_model
    from tuckerize.cli.tables import show
    from tuckerize.pipeline.inspect import inspect_model

    show(inspect_model(resolve_model(model)), as_json=as_json)


@app.command()
@boundary
def plan(
    model: Annotated[
        str, typer.Option(help="A folder, a Hugging Face id in the cache, or a short name.")
    ],
    calibration: Annotated[list[str], _TEXTS],
    calibration_tokens: Tokens = None,
    random_share: RandomShare = None,
    shape: ShapeChoice = None,
    allocate: AllocateChoice = None,
    multiple: Multiple = None,
    equal_widths: EqualWidths = None,
    group_size: GroupSize = None,
    device: DeviceOption = Device.AUTO,
    as_json: AsJson = False,
) -> None:
    """Predict what every --keep of a calibrated decomposition costs; decomposes nothing.

    One pass over the text, whose result is kept in the cache for decompose.

    Example: tuckerize plan --model DeepSeek-V2-Lite --calibration text.txt
    """
    settings = {
        "tokens": calibration_tokens,
        "random_share": random_share,
        "shape": shape,
        "allocate": allocate,
        "multiple": multiple,
        "equal_widths": equal_widths,
    }
    how = {"group_size": group_size, "calibration": _calibration(calibration, settings)}
    wanted = _recipe(None, {"keep": 1.0}, {}, how)

    from tuckerize.calibration.calibration_pass import CalibrationPass
    from tuckerize.checkpoint.hub import resolve_model
    from tuckerize.cli.progress import TerminalProgress
    from tuckerize.cli.tables import show
    from tuckerize.moe.source import SourceModel
    from tuckerize.parallel.backends import choose_device
    from tuckerize.planning.curve import damage_curve
    from tuckerize.planning.plan import make_plan

    source = SourceModel.open(resolve_model(model))
    make_plan(source, wanted)
    opened = CalibrationPass.open(source, wanted, choose_device(device, local_rank=0))
    report = damage_curve(wanted, opened, TerminalProgress())
    _write_notes(report.notes)
    show(report, as_json=as_json)


@app.command()
@boundary
def decompose(
    model: Annotated[
        str, typer.Option(help="A folder, a Hugging Face id in the cache, or a short name.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="The new folder; not needed with --dry-run.")
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(help="Core sizes r_E,r_H,r_I: numbers, percentages, or 'full'."),
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Kept share of the routed parameters, above 0, up to 1.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Relative residual that each stack may have.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="YAML file with rules for layers and projections, or a shipped name."),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers like 1-3,7,20-; all MoE layers by default.")
    ] = None,
    projections: Annotated[
        str | None, typer.Option(help="Of gate_proj,up_proj,down_proj; all three by default.")
    ] = None,
    group_size: GroupSize = None,
    joint: Annotated[Joint | None, typer.Option(help="One U_I for gate_proj and up_proj.")] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Type of stored factors; the source's by default.")
    ] = None,
    max_sweeps: Annotated[
        int | None, typer.Option(help="HOOI sweeps after the start, at most; 10 by default.")
    ] = None,
    engine: Annotated[
        Engine | None, typer.Option(help="Who decomposes; tensorly is the slow reference.")
    ] = None,
    calibration: Annotated[list[str] | None, _TEXTS] = None,
    calibration_tokens: Tokens = None,
    random_share: RandomShare = None,
    one_shot: Annotated[
        bool | None,
        typer.Option("--one-shot", help="Calibrate every layer behind the dense ones before it."),
    ] = None,
    shape: ShapeChoice = None,
    allocate: AllocateChoice = None,
    multiple: Multiple = None,
    equal_widths: EqualWidths = None,
    refine: Annotated[
        int | None,
        typer.Option(min=0, help="Gradient steps on each layer's output; 300 by default."),
    ] = None,
    device: DeviceOption = Device.AUTO,
    collective_timeout: CollectiveTimeout = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the plan, write nothing; reads weights only to calibrate a budget.",
        ),
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Decompose the routed experts of a model into a Tucker checkpoint.

    Needs exactly one of --rank, --keep, --tolerance and --recipe. A run that was interrupted
    continues when it is started again. Under torchrun the stacks are shared out.

    Example: tuckerize decompose --model DeepSeek-V2-Lite --keep 0.75 --output OUT
    """
    sizes = {"rank": rank, "keep": keep, "tolerance": tolerance}
    how = {
        "group_size": group_size,
        "joint": joint,
        "dtype": dtype,
        "max_sweeps": max_sweeps,
        "engine": engine,
        "calibration": _calibration(
            calibration,
            {
                "tokens": calibration_tokens,
                "random_share": random_share,
                "sequential": None if one_shot is None else not one_shot,
                "shape": shape,
                "allocate": allocate,
                "multiple": multiple,
                "equal_widths": equal_widths,
                "refine": refine,
            },
        ),
    }
    wanted = _recipe(recipe, sizes, {"layers": layers, "projections": projections}, how)
    if output is None and not dry_run:
        raise UsageError("--output is missing", hint="name a new folder, or add --dry-run")

    from tuckerize.calibration.calibration_pass import CalibrationPass
    from tuckerize.checkpoint.hub import resolve_model
    from tuckerize.checkpoint.output import OutputFolder
    from tuckerize.cli.progress import TerminalProgress
    from tuckerize.cli.tables import show
    from tuckerize.moe.source import SourceModel
    from tuckerize.parallel.backends import choose_device
    from tuckerize.parallel.processes import process_group
    from tuckerize.pipeline.compression import compress_model as run
    from tuckerize.pipeline.decompose_calibrated import (
        draft_plan,
        plan_calibrated,
    )
    from tuckerize.pipeline.inspect import describe_plan
    from tuckerize.planning.plan import Plan, make_plan

    with process_group(
        lambda local: choose_device(device, local_rank=local), _seconds(collective_timeout)
    ) as (processes, own_device):
        _refuse_calibration_of_several(wanted, processes.size)

        def prepare() -> tuple[Plan, CalibrationPass | None]:
            source = SourceModel.open(resolve_model(model))
            opened = None
            draft = make_plan(source, wanted)
            if wanted.calibration:
                opened = CalibrationPass.open(source, wanted, own_device)
                draft = draft_plan(wanted, opened)
            if output is not None and not dry_run:
                _refuse_overlap(output, source.checkpoint.folder)
                folder = OutputFolder(output)
                if processes.is_leader:
                    folder.claim(draft.fingerprint(), overwrite=overwrite)
                else:
                    folder.join(draft.fingerprint())
            if opened is None:
                return draft, None
            return plan_calibrated(wanted, opened, TerminalProgress()), opened

        plan, opened = processes.leader_first(prepare)
        if output is None or dry_run:
            if processes.is_leader:
                show(describe_plan(plan), as_json=as_json)
            return
        report = run(
            plan,
            output,
            model=model,
            device=own_device,
            processes=processes,
            progress=TerminalProgress(),
            calibration=opened,
        )
        if report is not None:
            _write_notes(report.notes)
            show(report, as_json=as_json)


@app.command()
@boundary
def shard(
    folder: TuckerFolder,
    tp: Annotated[int, typer.Option(help="Number of tensor-parallel processes.")],
    ep: Annotated[int, typer.Option(help="Number of expert-parallel processes.")] = 1,
    layout: Annotated[
        LayoutOption, typer.Option(help="How tensors are split; auto compares bytes and traffic.")
    ] = LayoutOption.AUTO,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Cut a Tucker checkpoint into one file per layer, group and process, in OUT/tpN[-epM]/.

    Example: tuckerize shard OUT --tp 4
    """
    from tuckerize.cli.progress import TerminalProgress
    from tuckerize.cli.tables import show
    from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
    from tuckerize.parallel.layouts import Parallelism
    from tuckerize.pipeline.shard import shard as run

    report = run(
        TuckerCheckpoint.open(folder),
        mesh=Parallelism(tp, ep),
        layout=None if layout == LayoutOption.AUTO else Layout(layout.value),
        overwrite=overwrite,
        progress=TerminalProgress(),
    )
    show(report, as_json=as_json)


@app.command()
@boundary
def verify(
    folder: TuckerFolder,
    model: Annotated[
        str | None,
        typer.Option(help="The source model; by default the one that decompose was given."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens for each layer.")] = 64,
    layers: Annotated[str | None, typer.Option(help="Layers like 1-3,7; all by default.")] = None,
    max_output_error: Annotated[
        float | None, typer.Option(help="Fail above this relative output error; needs the source.")
    ] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="Tensor-parallel processes.")] = None,
    ep: Annotated[int | None, typer.Option(min=1, help="Expert-parallel processes.")] = None,
    cp: Annotated[int, typer.Option(min=1, help="Context-parallel processes.")] = 1,
    sequence_parallel: Annotated[
        bool,
        typer.Option("--sequence-parallel", help="Each tensor-parallel process has own tokens."),
    ] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Give the same report bit for bit every time.")
    ] = False,
    dtype: Annotated[
        Dtype, typer.Option(help="Type to compute in; float32 tells the smallest faults.")
    ] = Dtype.FLOAT32,
    device: DeviceOption = Device.AUTO,
    collective_timeout: CollectiveTimeout = None,
    as_json: AsJson = False,
) -> None:
    """Verify a Tucker checkpoint and, under torchrun, its shards; exits 0 or 1.

    Without --tp and --ep, it takes the shards that fit the number of processes.

    Writes the report to verify.json beside what was verified.

    Example: torchrun --nproc-per-node 4 -m tuckerize verify OUT
    """
    from tuckerize.checkpoint.files import write_json
    from tuckerize.checkpoint.output import REPORT
    from tuckerize.cli.progress import TerminalProgress
    from tuckerize.cli.tables import show
    from tuckerize.format.shards import find_sharding
    from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
    from tuckerize.parallel.backends import choose_device
    from tuckerize.parallel.determinism import make_deterministic
    from tuckerize.parallel.processes import process_group, started_by_torchrun
    from tuckerize.pipeline.verify import Verification
    from tuckerize.pipeline.verify import verify as run
    from tuckerize.recipe import select_layers
    from tuckerize.report import to_json
    from tuckerize.runtime.experts import activation_of

    if deterministic:
        make_deterministic()
    with process_group(
        lambda local: choose_device(device, local_rank=local), _seconds(collective_timeout)
    ) as (processes, own_device):

        def prepare() -> tuple[Verification, tuple[int, ...]]:
            tucker = TuckerCheckpoint.open(folder)
            chosen = select_layers(layers, tucker.manifest.layers)
            activation_of(tucker.config)
            source = _source(model, tucker, needed=max_output_error is not None)
            sharding = None
            if started_by_torchrun():
                sharding = find_sharding(tucker, processes.size, tp=tp, ep=ep, cp=cp)
            elif tp or ep or cp > 1 or sequence_parallel:
                raise UsageError(
                    "a mesh needs processes, and this is one that torchrun did not start",
                    hint=f"run: torchrun --nproc-per-node {(tp or 1) * (ep or 1) * cp} "
                    f"-m tuckerize verify {folder} ...",
                )
            run_of = Verification(
                tucker,
                sharding,
                source,
                processes,
                own_device,
                tokens,
                sequence_parallel,
                dtype,
            )
            return run_of, chosen

        verification, chosen = processes.leader_first(prepare)
        report = run(
            verification,
            layers=chosen,
            max_output_error=max_output_error,
            progress=TerminalProgress(),
        )
        sharding = verification.sharding
        if processes.is_leader:
            write_json((sharding.folder if sharding else folder) / REPORT, to_json(report))
            show(report, as_json=as_json)
    if not report.passed:
        raise SystemExit(NO)


@app.command()
@boundary
def reconstruct(
    folder: TuckerFolder,
    output: Annotated[Path, typer.Option(help="The new folder.")],
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Expand a Tucker checkpoint to an ordinary dense one that any engine loads.

    Example: tuckerize reconstruct OUT --output DENSE
    """
    from tuckerize.cli.progress import TerminalProgress
    from tuckerize.cli.tables import show
    from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
    from tuckerize.pipeline.reconstruct import reconstruct as run

    tucker = TuckerCheckpoint.open(folder)
    _refuse_overlap(output, folder)
    report = run(tucker, output, overwrite=overwrite, progress=TerminalProgress())
    show(report, as_json=as_json)


@app.command()
@boundary
def evaluate(
    model: Annotated[
        str, typer.Argument(help="A dense model or a Tucker checkpoint: folder, id or short name.")
    ],
    text: Annotated[
        list[str], typer.Option(help="As --calibration: PATH or PATH:WEIGHT; several are a mix.")
    ],
    against: Annotated[
        str | None, typer.Option(help="Another of the same kind, on the same text.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=2, help="Tokens, evenly spread over the text.")
    ] = 65536,
    window: Annotated[int, typer.Option(min=2, help="Tokens that are read at once.")] = 512,
    device: DeviceOption = Device.AUTO,
    as_json: AsJson = False,
) -> None:
    """Measure the perplexity on a text, with one decoder layer in memory at a time.

    Example: tuckerize evaluate OUT --text text.txt --against DeepSeek-V2-Lite
    """
    from tuckerize.checkpoint.hub import resolve_model
    from tuckerize.cli.progress import TerminalProgress
    from tuckerize.cli.tables import show
    from tuckerize.parallel.backends import choose_device
    from tuckerize.pipeline.evaluate import evaluate as run

    report = run(
        [resolve_model(name) for name in (against, model) if name is not None],
        text,
        tokens=tokens,
        window=window,
        device=choose_device(device),
        progress=TerminalProgress(),
    )
    _write_notes(report.notes)
    show(report, as_json=as_json)


@app.command()
@boundary
def generate(
    folder: TuckerFolder,
    prompt: Annotated[str, typer.Option(help="What the model continues.")],
    tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 64,
    device: DeviceOption = Device.AUTO,
) -> None:
    """Continue a prompt with a Tucker checkpoint, greedily; the whole model is loaded.

    Example: tuckerize generate OUT --prompt "Once upon a time"
    """
    from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
    from tuckerize.parallel.backends import choose_device
    from tuckerize.pipeline.generate import generate as run

    tucker = TuckerCheckpoint.open(folder)
    typer.echo(run(tucker.folder, prompt, tokens=tokens, device=choose_device(device)))


@app.command()
@boundary
def doctor(as_json: AsJson = False) -> None:
    """Show device, versions and variables, and what is wrong with them; exits 0 or 1.

    Example: tuckerize doctor
    """
    from tuckerize.cli.tables import show
    from tuckerize.pipeline.doctor import examine

    report = examine()
    show(report, as_json=as_json)
    if not report.passed:
        raise SystemExit(NO)


def _recipe(
    file: str | None, sizes: dict[str, Any], where: dict[str, Any], how: dict[str, Any]
) -> Recipe:
    """The recipe from a file, or from options; exactly one way to say the size."""
    from tuckerize.recipe import find_recipe, parse_recipe, read_recipe

    given = [name for name, value in {**sizes, "recipe": file}.items() if value is not None]
    if len(given) != 1:
        raise UsageError(
            "no size was given" if not given else f"--{' and --'.join(given)} exclude each other",
            hint="give exactly one of:\n"
            "  --keep 0.75             keep 75 % of the routed parameters\n"
            "  --rank full,full,75%    core sizes r_E,r_H,r_I: numbers, percentages, or 'full'\n"
            "  --tolerance 0.1         relative residual that each stack may have\n"
            "or --recipe FILE, which says it for each range of layers",
        )
    if file is not None:
        also = [name for name, value in {**where, **how}.items() if value is not None]
        if also:
            option = also[0].replace("_", "-")
            raise UsageError(
                f"--{option} and --recipe exclude each other",
                hint=f"write {also[0]} into {file}",
            )
        return read_recipe(find_recipe(file))
    rule = {name: value for name, value in {**sizes, **where}.items() if value is not None}
    if "projections" in rule:
        rule["projections"] = [part.strip() for part in str(rule["projections"]).split(",")]
    settings = {name: value for name, value in how.items() if value is not None}
    return parse_recipe({"rules": [rule], **settings}, place="the options")


def _seconds(count: int | None) -> timedelta | None:
    return None if count is None else timedelta(seconds=count)


def _write_notes(notes: tuple[str, ...]) -> None:
    for note in notes:
        sys.stderr.write(f"note: {note}\n")


def _refuse_calibration_of_several(recipe: Recipe, processes: int) -> None:
    """Calibration is one pass through the layers: it cannot be shared out."""
    if recipe.calibration and processes > 1:
        raise UsageError(
            "--calibration runs in one process: a layer needs the ones before it",
            hint="start it without torchrun",
        )


def _calibration(texts: list[str] | None, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The calibration part of a recipe from options; None without a text."""
    given = {name: value for name, value in settings.items() if value is not None}
    if texts:
        return {"texts": texts, **given}
    if given:
        names = {"tokens": "calibration-tokens", "sequential": "one-shot"}
        first = next(iter(given))
        option = names.get(first, first.replace("_", "-"))
        raise UsageError(
            f"--{option} belongs to --calibration, which is not given",
            hint="add --calibration FILE with a text like those the model is used for",
        )
    return None


def _source(model: str | None, tucker: TuckerCheckpoint, *, needed: bool) -> SourceModel | None:
    """The source model: the one named, else the recorded one where it is still there."""
    from tuckerize.format.tucker_checkpoint import open_source

    if model is not None:
        return open_source(model, tucker)
    try:
        return open_source(tucker.manifest.source.model, tucker)
    except TuckerizeError as error:
        if needed:
            raise UsageError(
                f"--max-output-error needs the source, and {error.message}",
                hint="name the source with --model",
            ) from None
        sys.stderr.write(
            f"note: without the source there is no comparison with the dense model "
            f"({error.message}); name it with --model\n"
        )
        return None


def _refuse_overlap(output: Path, source: Path) -> None:
    """Refuse an output folder that is the source, or lies in it, or holds it."""
    new, old = output.resolve(), source.resolve()
    if new == old or new in old.parents or old in new.parents:
        raise OutputError(
            f"the output {output} and the source {source} lie in one another",
            hint="choose an output folder elsewhere",
        )

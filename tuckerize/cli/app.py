"""The commands: each fills a request from its options, calls the API, and prints the report.

They import what they need when they run, so that `--help` is quick.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated

import typer

from tuckerize.cli import mesh_options, options
from tuckerize.cli.boundary import NO, boundary
from tuckerize.cli.decompose import decompose
from tuckerize.cli.heal import heal
from tuckerize.cli.plan import plan
from tuckerize.cli.printing import write_out
from tuckerize.cli.recipes import recipes
from tuckerize.cli.report import write_report
from tuckerize.cli.verify import verify
from tuckerize.domain import CoreType, Device
from tuckerize.version import __version__, installed_version

app = typer.Typer(
    name="tuckerize",
    help="Make Mixture-of-Experts checkpoints smaller by Tucker decomposition, and verify them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(recipes, name="recipes")
app.command(name="report")(write_report)


def _version(wanted: bool) -> None:  # noqa: FBT001
    if wanted:
        names = ("torch", "torch_npu", "transformers", "vllm")
        found = ((name, installed_version(name)) for name in names)
        others = "".join(f", {name} {version}" for name, version in found if version)
        where = f"Python {platform.python_version()}, {platform.platform()}"
        write_out(f"tuckerize {__version__}\n{where}{others}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            metavar="",
            callback=_version,
            is_eager=True,
            help="Print the version, and those of what it runs on.",
        ),
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command()
@boundary
def inspect(model: options.ModelArgument, as_json: options.AsJson = False) -> None:
    """Show family, experts and sizes of a model.

    Reads headers and configuration only.

    Example: tuckerize inspect DeepSeek-V2-Lite
    """
    from tuckerize.cli.tables import show
    from tuckerize.pipeline.inspect import inspect as run

    show(run(model), as_json=as_json)


app.command()(plan)


app.command()(decompose)


@app.command()
@boundary
def shard(
    folder: options.TuckerFolder,
    tp: mesh_options.Tp,
    ep: mesh_options.Ep = 1,
    layout: mesh_options.LayoutOption = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Cut a Tucker checkpoint into shards for a mesh.

    Writes one file per layer, group and process to FOLDER/tpN[-epM]/.

    Example: tuckerize shard OUT --tp 4
    """
    from tuckerize.cli.progress import TerminalProgress
    from tuckerize.cli.tables import show
    from tuckerize.pipeline.shard import ShardRequest
    from tuckerize.pipeline.shard import shard as run

    request = ShardRequest(folder=folder, tp=tp, ep=ep, layout=layout, overwrite=overwrite)
    with TerminalProgress() as progress:
        report = run(request, progress)
    show(report, as_json=as_json)


app.command()(verify)


@app.command()
@boundary
def check(folder: options.TuckerFolder, as_json: options.AsJson = False) -> None:
    """Hash every file of a Tucker checkpoint and of its shards.

    Compares them with the hashes that were recorded when they were written; computes nothing.
    Exits with 0 if all are the same, 1 if not.

    Example: tuckerize check OUT
    """
    from tuckerize.cli.progress import TerminalProgress
    from tuckerize.cli.tables import show
    from tuckerize.pipeline.check import check as run

    with TerminalProgress() as progress:
        report = run(folder, progress)
    show(report, as_json=as_json)
    if not report.passed:
        raise SystemExit(NO)


@app.command()
@boundary
def quantize(
    folder: options.TuckerFolder,
    output: options.DenseOutput,
    cores: options.Cores = CoreType.W4,
    model: options.SourceModel = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Quantise the cores of a Tucker checkpoint.

    Rounds to nearest; decompose --quantize with --calibration loses less.

    Example: tuckerize quantize OUT --output OUT4
    """
    from tuckerize.cli.progress import TerminalProgress
    from tuckerize.cli.tables import show
    from tuckerize.pipeline.quantize import QuantizeRequest
    from tuckerize.pipeline.quantize import quantize as run

    request = QuantizeRequest(
        folder=folder, output=output, cores=cores, model=model, overwrite=overwrite
    )
    with TerminalProgress() as progress:
        report = run(request, progress)
    show(report, as_json=as_json)


app.command()(heal)


@app.command()
@boundary
def push(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="Tucker checkpoint, or what reconstruct wrote."),
    ],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="Its id: owner/name.")],
    base_model: Annotated[
        str | None, typer.Option(metavar="ID", help="The source's id on the Hub, for the card.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", metavar="", help="Show files and card; needs no network."),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Publish a result on the Hugging Face Hub.

    Hashes all files first. The model card gets what evaluate --against measured. Shards stay here.

    Example: tuckerize push OUT me/DeepSeek-V2-Lite-small --dry-run
    """
    from tuckerize.cli.progress import TerminalProgress
    from tuckerize.cli.tables import show
    from tuckerize.pipeline.push import PushRequest
    from tuckerize.pipeline.push import push as run

    request = PushRequest(
        folder=folder,
        repository=repository,
        base_model=base_model,
        private=private,
        dry_run=dry_run,
    )
    with TerminalProgress() as progress:
        report = run(request, progress)
    show(report, as_json=as_json)


@app.command()
@boundary
def reconstruct(
    folder: options.TuckerFolder,
    output: options.DenseOutput,
    dequantize: Annotated[
        bool,
        typer.Option(
            "--dequantize", metavar="", help="Write quantised experts in the type of the factors."
        ),
    ] = False,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Make an ordinary checkpoint of a Tucker checkpoint.

    Any engine loads the result. Quantised experts stay so if nothing but their width is truncated.

    Example: tuckerize reconstruct OUT --output DENSE
    """
    from tuckerize.cli.progress import TerminalProgress
    from tuckerize.cli.tables import show
    from tuckerize.pipeline.reconstruct import ReconstructRequest
    from tuckerize.pipeline.reconstruct import reconstruct as run

    request = ReconstructRequest(
        folder=folder, output=output, dequantize=dequantize, overwrite=overwrite
    )
    with TerminalProgress() as progress:
        report = run(request, progress)
    show(report, as_json=as_json)


@app.command()
@boundary
def fold(
    model: options.FoldedModel,
    output: options.DenseOutput,
    keep: options.KeptLatent,
    calibration: options.Calibration = None,
    device: options.DeviceOption = Device.AUTO,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Make the latent space of Nemotron-H smaller: an ordinary checkpoint.

    The projection is folded into the model's own layers around its experts.

    Example: tuckerize fold Nemotron-3-Super --keep 0.75 --calibration text.txt --output OUT
    """
    from tuckerize.cli.progress import TerminalProgress
    from tuckerize.cli.tables import show
    from tuckerize.pipeline.fold import FoldRequest
    from tuckerize.pipeline.fold import fold as run

    request = FoldRequest(
        model=model,
        output=output,
        keep=keep,
        calibration=calibration,
        device=device,
        overwrite=overwrite,
    )
    with TerminalProgress() as progress:
        report = run(request, progress)
    show(report, as_json=as_json)


@app.command()
@boundary
def evaluate(
    model: options.ModelArgument,
    text: options.Text,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Another of the same kind, on the same text."),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=2, metavar="N", help="Tokens, evenly spread over the text.")
    ] = 65536,
    window: Annotated[
        int, typer.Option(min=2, metavar="N", help="Tokens that are read at once.")
    ] = 512,
    no_chat_template: options.PlainChats = False,
    device: options.DeviceOption = Device.AUTO,
    as_json: options.AsJson = False,
) -> None:
    """Measure the perplexity on a text, and the divergence from another model.

    One decoder layer is in memory at a time.

    Example: tuckerize evaluate OUT --text text.txt --against DeepSeek-V2-Lite
    """
    from tuckerize.cli.progress import TerminalProgress
    from tuckerize.cli.tables import show
    from tuckerize.pipeline.evaluate import EvaluateRequest
    from tuckerize.pipeline.evaluate import evaluate as run

    request = EvaluateRequest(
        model=model,
        text=text,
        against=against,
        tokens=tokens,
        window=window,
        chat_template=not no_chat_template,
        device=device,
    )
    with TerminalProgress() as progress:
        report = run(request, progress)
    show(report, as_json=as_json)


@app.command()
@boundary
def generate(
    folder: options.TuckerFolder,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Text that the model continues.")],
    tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Largest number of new tokens.")
    ] = 64,
    device: options.DeviceOption = Device.AUTO,
) -> None:
    """Continue a prompt with a Tucker checkpoint.

    Greedily; the whole model is loaded.

    Example: tuckerize generate OUT --prompt "Once upon a time"
    """
    from tuckerize.pipeline.generate import GenerateRequest
    from tuckerize.pipeline.generate import generate as run

    request = GenerateRequest(folder=folder, prompt=prompt, tokens=tokens, device=device)
    write_out(f"{run(request)}\n")


@app.command()
@boundary
def doctor(as_json: options.AsJson = False) -> None:
    """Show device, versions and variables, and what is wrong.

    Exits with 0 if nothing is wrong, 1 otherwise.

    Example: tuckerize doctor
    """
    from tuckerize.cli.tables import show
    from tuckerize.pipeline.doctor import doctor as run

    report = run()
    show(report, as_json=as_json)
    if not report.passed:
        raise SystemExit(NO)

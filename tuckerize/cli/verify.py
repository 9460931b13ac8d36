"""The command `verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from tuckerize.cli import mesh_options, options
from tuckerize.cli.boundary import NO, boundary
from tuckerize.domain import Device, Dtype


@boundary
def verify(
    folder: options.TuckerFolder,
    model: options.SourceModel = None,
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens for each layer.")] = 64,
    layers: Annotated[
        str | None, typer.Option(metavar="LAYERS", help="Layers like 1-3,7; all by default.")
    ] = None,
    max_output_error: Annotated[
        float | None,
        typer.Option(
            metavar="ERROR", help="Fail above this relative output error; needs the source."
        ),
    ] = None,
    tp: mesh_options.MeshTp = None,
    ep: mesh_options.MeshEp = None,
    cp: mesh_options.Cp = 1,
    sequence_parallel: mesh_options.SequenceParallel = False,
    deterministic: options.Deterministic = False,
    dtype: options.ComputeDtype = Dtype.FLOAT32,
    device: options.DeviceOption = Device.AUTO,
    collective_timeout: options.CollectiveTimeout = None,
    as_json: options.AsJson = False,
) -> None:
    """Verify a Tucker checkpoint and, under torchrun, its shards.

    Hashes all files, then computes the layers. Without --tp and --ep, it takes the shards that
    fit the number of processes. Writes the report to verify.json beside what was verified. Exits
    with 0 if it passed, 1 if not.

    Example: torchrun --nproc-per-node 4 -m tuckerize verify OUT
    """
    from tuckerize.cli.progress import TerminalProgress, is_leader
    from tuckerize.cli.tables import show
    from tuckerize.pipeline.verify import VerifyRequest
    from tuckerize.pipeline.verify import verify as run

    request = VerifyRequest(
        folder=folder,
        model=model,
        tokens=tokens,
        layers=layers,
        max_output_error=max_output_error,
        tp=tp,
        ep=ep,
        cp=cp,
        sequence_parallel=sequence_parallel,
        deterministic=deterministic,
        dtype=dtype,
        device=device,
        collective_timeout=collective_timeout,
    )
    with TerminalProgress() as progress:
        report = run(request, progress)
    if is_leader():
        show(report, as_json=as_json)
    if not report.passed:
        raise SystemExit(NO)

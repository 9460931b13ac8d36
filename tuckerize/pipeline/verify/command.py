"""The `verify` command: open the checkpoint, its shards and its source, and verify the layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

from tuckerize.checkpoint.files import write_json
from tuckerize.checkpoint.output import REPORT
from tuckerize.domain import Device, Dtype
from tuckerize.errors import TuckerizeError, UsageError
from tuckerize.format.manifest import sharding_name
from tuckerize.format.shards import Sharding, available_shardings, find_sharding
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint, open_source
from tuckerize.moe.source import SourceModel
from tuckerize.parallel.backends import choose_device
from tuckerize.parallel.determinism import make_deterministic
from tuckerize.parallel.processes import process_group, started_by_torchrun
from tuckerize.pipeline.verify.verification import Verification, verify_layers
from tuckerize.progress import Progress, SilentProgress
from tuckerize.recipe import select_layers
from tuckerize.report import VerifyReport, to_json
from tuckerize.runtime.experts import activation_of


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyRequest:
    """A verification to carry out.

    Attributes:
        folder: The Tucker checkpoint.
        model: The source model; by default the one that decompose was given.
        tokens: Tokens per layer.
        layers: Layers like "1-3,7"; all by default.
        max_output_error: Bound on the relative output error against the source, if any.
        tp: Tensor-parallel processes; with ep, by default those of shards that fit the run.
        ep: Expert-parallel processes.
        cp: Context-parallel processes.
        sequence_parallel: Split the tokens over the tensor-parallel processes.
        deterministic: Give the same report bit for bit every time.
        dtype: Type to compute in: float32, bfloat16 or float16.
        device: Where the layers are computed: auto, npu, cuda or cpu.
        collective_timeout: Seconds that a process waits for the others; by default 7200 on npu,
            otherwise 86400.
    """

    folder: str | Path
    model: str | Path | None = None
    tokens: int = 64
    layers: str | None = None
    max_output_error: float | None = None
    tp: int | None = None
    ep: int | None = None
    cp: int = 1
    sequence_parallel: bool = False
    deterministic: bool = False
    dtype: str = Dtype.FLOAT32
    device: str = Device.AUTO
    collective_timeout: float | None = None


def verify(request: VerifyRequest, progress: Progress | None = None) -> VerifyReport:
    """Verify a Tucker checkpoint and, under torchrun, its shards.

    Writes the report to `verify.json` beside what was verified.

    Args:
        request: The verification.
        progress: Shows how far the work is.

    Returns:
        The same report on every process; its `passed` is the verdict.

    Raises:
        TuckerizeError: The verification cannot be carried out; the message says why.

    Example:
        >>> verify(VerifyRequest(folder="OUT")).passed  # doctest: +SKIP
    """
    progress = progress or SilentProgress()
    device, dtype = Device.parse(request.device), Dtype.parse(request.dtype)
    seconds = request.collective_timeout
    if request.deterministic:
        make_deterministic()
    with process_group(
        lambda local: choose_device(device, local_rank=local),
        None if seconds is None else timedelta(seconds=seconds),
    ) as (processes, own_device):

        def prepare() -> tuple[Verification, tuple[int, ...], tuple[str, ...]]:
            tucker = TuckerCheckpoint.open(Path(request.folder))
            layers = select_layers(request.layers, tucker.manifest.layers)
            activation_of(tucker.config)
            source, notes = _source(request, tucker)
            sharding = _sharding(request, tucker, processes.size)
            if sharding is None:
                notes += _not_verified(tucker)
            run = Verification(
                tucker,
                sharding,
                source,
                processes,
                own_device,
                request.tokens,
                request.sequence_parallel,
                dtype,
            )
            return run, layers, notes

        run, layers, notes = processes.leader_first(prepare)
        report = verify_layers(
            run, layers=layers, max_output_error=request.max_output_error, progress=progress
        )
        report = replace(report, notes=notes)
        if processes.is_leader:
            folder = run.sharding.folder if run.sharding else run.tucker.folder
            write_json(folder / REPORT, to_json(report))
    return report


def _sharding(request: VerifyRequest, tucker: TuckerCheckpoint, processes: int) -> Sharding | None:
    """The shards for the processes of this run; None without torchrun."""
    tp, ep, cp = request.tp, request.ep, request.cp
    if started_by_torchrun():
        return find_sharding(tucker, processes, tp=tp, ep=ep, cp=cp)
    if tp or ep or cp > 1 or request.sequence_parallel:
        raise UsageError(
            "a mesh needs processes, and this is one that torchrun did not start",
            hint=f"run: torchrun --nproc-per-node {(tp or 1) * (ep or 1) * cp} "
            f"-m tuckerize verify {tucker.folder} ...",
        )
    return None


def _not_verified(tucker: TuckerCheckpoint) -> tuple[str, ...]:
    """A note on shards that lie beside a checkpoint that is verified unsharded."""
    meshes = available_shardings(tucker.folder)
    if not meshes:
        return ()
    names = ", ".join(sharding_name(tp=mesh.tp, ep=mesh.ep) for mesh in meshes)
    processes = meshes[0].tp * meshes[0].ep
    return (
        f"the shards were not verified: {names}; run: "
        f"torchrun --nproc-per-node {processes} -m tuckerize verify {tucker.folder}",
    )


def _source(
    request: VerifyRequest, tucker: TuckerCheckpoint
) -> tuple[SourceModel | None, tuple[str, ...]]:
    """The source model, with a note where there is none: the one named, else the recorded one."""
    if request.model is not None:
        return open_source(str(request.model), tucker), ()
    try:
        return open_source(tucker.manifest.source.model, tucker), ()
    except TuckerizeError as error:
        if request.max_output_error is not None:
            raise UsageError(
                f"--max-output-error needs the source, and {error.message}",
                hint="name the source with --model",
            ) from None
        return None, (
            f"without the source there is no comparison with the dense model "
            f"({error.message}); name it with --model",
        )

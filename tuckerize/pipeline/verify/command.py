"""The `verify` command: hash the files of a checkpoint and its shards, then verify the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch

from tuckerize.checkpoint.files import write_json
from tuckerize.checkpoint.output import REPORT
from tuckerize.domain import Device, Dtype
from tuckerize.errors import TuckerizeError, UsageError
from tuckerize.format.check import FileFault, Inventory, take_inventory
from tuckerize.format.manifest import available_shardings, sharding_name
from tuckerize.format.shards import Sharding, find_mesh
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint, open_source
from tuckerize.moe.source import SourceModel
from tuckerize.parallel.backends import check_encoding, choose_device
from tuckerize.parallel.determinism import make_deterministic
from tuckerize.parallel.layouts import Parallelism
from tuckerize.parallel.memory import require_memory
from tuckerize.parallel.processes import Processes, process_group, started_by_torchrun
from tuckerize.pipeline.verify.verification import TOLERANCES, Verification, verify_layers
from tuckerize.progress import Progress, SilentProgress
from tuckerize.recipe_text import select_layers
from tuckerize.report.json_form import to_json
from tuckerize.report.verification import VerifyReport
from tuckerize.runtime.activations import activation_of


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

    Hashes every file of the checkpoint and of the shards, then computes the layers. Writes the
    report to `verify.json` beside what was verified.

    Args:
        request: The verification.
        progress: Shows how far the work is.

    Returns:
        The same report on every process; its `passed` is the verdict. A note of process 0 says
            if it could not be written.

    Raises:
        TuckerizeError: The verification cannot be carried out; the message says why.

    Example:
        >>> verify(VerifyRequest(folder="OUT")).passed  # doctest: +SKIP
    """
    progress = progress or SilentProgress()
    device = Device.parse(request.device)
    Dtype.parse(request.dtype)
    seconds = request.collective_timeout
    if request.deterministic:
        make_deterministic()
    with process_group(
        lambda local: choose_device(device, local_rank=local),
        None if seconds is None else timedelta(seconds=seconds),
    ) as (processes, own_device):
        folder = Path(request.folder)

        def look() -> tuple[Parallelism | None, Inventory]:
            take_inventory(folder, ())  # what is no checkpoint is told before its shards are missed
            mesh = _mesh(request, folder, processes.size)
            return mesh, take_inventory(folder, _names(mesh))

        mesh, inventory = processes.leader_first(look)
        damaged, notes = _hash(inventory, processes, progress)
        if any(map(inventory.prevents_computing, damaged)):
            report = _not_computed(request, mesh, own_device.type)
        else:

            def prepare() -> tuple[Verification, tuple[int, ...], tuple[str, ...]]:
                return _open(request, mesh, processes, own_device)

            run, layers, found = processes.together(prepare)
            notes += found
            by_layer: dict[int, list[str]] = {}
            for fault in damaged:
                if fault.name in inventory.layer_of:
                    by_layer.setdefault(inventory.layer_of[fault.name], []).append(str(fault))
            report = verify_layers(
                run,
                layers=layers,
                damaged=by_layer,
                max_output_error=request.max_output_error,
                progress=progress,
            )
        others = tuple(name for name in available_shardings(folder) if name not in _names(mesh))
        notes += _how_to_verify(folder, others)
        report = replace(report, damaged=damaged, not_verified=others, notes=notes)
        if processes.is_leader:
            report = _keep(report, folder.joinpath(*_names(mesh), REPORT))
    return report


def _keep(report: VerifyReport, path: Path) -> VerifyReport:
    """Write a report; where that is not possible, the report says so."""
    try:
        write_json(path, to_json(report))
    except OSError as error:
        note = f"the report was not kept: {error.strerror} ({path})"
        return replace(report, notes=(*report.notes, note))
    return report


def _mesh(request: VerifyRequest, folder: Path, processes: int) -> Parallelism | None:
    """The mesh of this run; None without torchrun."""
    tp, ep, cp = request.tp, request.ep, request.cp
    if started_by_torchrun():
        return find_mesh(folder, processes, tp=tp, ep=ep, cp=cp)
    if tp or ep or cp > 1 or request.sequence_parallel:
        raise UsageError(
            "a mesh needs processes, and this is one that torchrun did not start",
            hint=f"run: torchrun --nproc-per-node {(tp or 1) * (ep or 1) * cp} "
            f"-m tuckerize verify {folder} ...",
        )
    return None


def _names(mesh: Parallelism | None) -> tuple[str, ...]:
    """Folder of the shards of a mesh, if there is one."""
    return () if mesh is None else (sharding_name(tp=mesh.tp, ep=mesh.ep),)


def _how_to_verify(folder: Path, names: Sequence[str]) -> tuple[str, ...]:
    """A note on shards that lie beside what was verified."""
    if not names:
        return ()
    mesh = available_shardings(folder)[names[0]]
    return (
        f"the shards were not verified: {', '.join(names)}; run: torchrun --nproc-per-node "
        f"{mesh.tp * mesh.ep} -m tuckerize verify {folder}",
    )


def _hash(
    inventory: Inventory, processes: Processes, progress: Progress
) -> tuple[tuple[FileFault, ...], tuple[str, ...]]:
    """Faults of all files, which the processes share out, and notes on them."""
    own = inventory.files[processes.rank :: processes.size]
    progress.start(sum(file.bytes for file in own))
    progress.stage("files: sizes and hashes")
    found = processes.gather(inventory.hash(own, progress.advance))
    progress.close()
    return inventory.verdict(fault for part in found for fault in part)


def _open(
    request: VerifyRequest, mesh: Parallelism | None, processes: Processes, device: torch.device
) -> tuple[Verification, tuple[int, ...], tuple[str, ...]]:
    """Open what is verified; returns the layers and notes, too."""
    tucker = TuckerCheckpoint.open(Path(request.folder))
    check_encoding(device, tucker.manifest.cores)
    layers = select_layers(request.layers, tucker.manifest.layers)
    for layer in layers:
        activation_of(tucker.family.glu(tucker.config, layer))
    source, notes = _source(request, tucker)
    if source is not None:
        stack = source.moe.shape._replace(experts=tucker.manifest.group_size).parameters
        require_memory(
            stack * source.dtype.itemsize,
            "a projection of the experts of a group",
            "start fewer processes",
            processes=processes.local_size,
        )
    if tucker.manifest.healed is not None:
        notes += (
            "the weights were trained after the decomposition (tuckerize heal): no residual was "
            "recorded to compare with",
        )
    run = Verification(
        tucker,
        None if mesh is None else Sharding.of(tucker, mesh),
        source,
        processes,
        device,
        request.tokens,
        request.sequence_parallel,
        Dtype.parse(request.dtype),
    )
    return run, layers, notes


def _not_computed(request: VerifyRequest, mesh: Parallelism | None, device: str) -> VerifyReport:
    """Report of a verification that ended with the files."""
    size = mesh or Parallelism(1)
    return VerifyReport(
        folder=str(request.folder),
        tp_size=size.tp,
        ep_size=size.ep,
        cp_size=size.cp,
        sequence_parallel=request.sequence_parallel,
        layout="unsharded" if mesh is None else "sharded",
        device=device,
        tokens=request.tokens,
        tolerance=TOLERANCES[Dtype.parse(request.dtype)],
        layers=(),
        traffic=(),
        dtype=request.dtype,
    )


def _source(
    request: VerifyRequest, tucker: TuckerCheckpoint
) -> tuple[SourceModel | None, tuple[str, ...]]:
    """The source model, with a note where there is none: the one named, else the recorded one."""
    if request.model is not None:
        return open_source(str(request.model), tucker), ()
    try:
        if tucker.manifest.source is None:
            raise UsageError("transformers has saved the checkpoint again, without its source")
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

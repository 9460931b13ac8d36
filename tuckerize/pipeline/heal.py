"""The `heal` command: train a Tucker checkpoint to make up for what compression has lost."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuckerize.calibration.text import fingerprint, parse_source, read_split_windows
from tuckerize.checkpoint.identity import identities
from tuckerize.checkpoint.output import OutputFolder, refuse_overlap
from tuckerize.checkpoint.reader import TORCH_DTYPES, Checkpoint
from tuckerize.checkpoint.space import require_space
from tuckerize.domain import CoreType, Device, Part
from tuckerize.errors import CheckpointError, ParallelError, UsageError
from tuckerize.format.manifest import read_tucker_manifest
from tuckerize.format.records import HealRecord
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.healing.objective import Windows
from tuckerize.healing.result import LOG, write_result
from tuckerize.healing.setup import Spread, check_parts, make_ready
from tuckerize.healing.state import SavedRun
from tuckerize.healing.training import Schedule, Training
from tuckerize.names import CorePart, TensorName
from tuckerize.parallel.backends import check_encoding, choose_device
from tuckerize.parallel.memory import require_memory
from tuckerize.parallel.mesh import make_mesh
from tuckerize.parallel.processes import Processes, process_group
from tuckerize.pipeline.evaluate import Evaluated
from tuckerize.pipeline.teacher import bytes_of_predictions, open_teacher, predictions
from tuckerize.planning.duration import announce, duration, training_work
from tuckerize.progress import Progress, SilentProgress
from tuckerize.recipe_files import Texts, list_of_texts
from tuckerize.report.results import HealReport
from tuckerize.version import __version__

# Part of the text that decides, and is not trained on.
_HELD_OUT = 1 / 16
# Values on disk per trained one: weights and two moments, before and after a save, and the best.
_SAVED = 7
# Values in memory per trained one, beside its own: gradient and two moments.
_COPIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class HealRequest:
    """A Tucker checkpoint to train.

    Attributes:
        folder: The Tucker checkpoint.
        data: Text or JSONL file, PATH or PATH:WEIGHT, or several.
        output: The new folder.
        train: What is trained, of cores, factors, scales, routers and norms; by default what
            compression wrote: cores, factors and scales.
        teacher: Dense model whose predictions are learned too: folder, Hugging Face id or short
            name. Its predictions are found before training, layer by layer.
        teacher_share: Share of the KL divergence to its predictions in the loss, in (0, 1].
        tokens: Tokens to train on; a shorter text is read several times.
        window: Tokens per window; all but its first are predicted.
        batch: Windows per step, of all processes.
        at_once: Windows per forward of one process; the gradients of a step are accumulated.
        learning_rate: Largest step of a value, relative to the root mean square of its tensor.
        recompute: Compute activations again in the backward, to save memory.
        seed: Of the windows and their order.
        tp: Tensor-parallel processes, for which the checkpoint has shards; the others are replicas.
        fsdp: Split all parameters over the replicas (FSDP).
        chat_template: Render conversations by the tokenizer's chat template, if it has one.
        device: Where to compute: auto, npu, cuda or cpu.
        collective_timeout: Seconds that a process waits for the others; by default 7200 on npu,
            otherwise 86400.
        overwrite: Begin anew: replace an earlier result, finished or not.
    """

    folder: str | Path
    data: Texts
    output: str | Path
    train: str | None = None
    teacher: str | Path | None = None
    teacher_share: float = 0.5
    tokens: int = 1048576
    window: int = 512
    batch: int = 16
    at_once: int = 4
    learning_rate: float = 1e-3
    recompute: bool = False
    seed: int = 0
    tp: int = 1
    fsdp: bool = False
    chat_template: bool = True
    device: str = Device.AUTO
    collective_timeout: float | None = None
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class _Prepared:
    """Agreement of all processes before the model is loaded."""

    tucker: TuckerCheckpoint
    parts: dict[str, Part]
    teacher: Evaluated | None
    training_SL: Tensor
    validation_SL: Tensor
    schedule: Schedule
    plan: Mapping[str, Any]
    notes: tuple[str, ...]


def heal(request: HealRequest, progress: Progress | None = None) -> HealReport:
    """Train a Tucker checkpoint on a text, to make up for what compression has lost.

    The whole model is loaded; under torchrun its processes are replicas, split it (FSDP), or share
    each expert (`tp`). A part of the text decides which state is kept. An interrupted run continues
    when it is started again, on the CPU with the same bits.

    Args:
        request: The checkpoint and the training.
        progress: Shows how far the work is.

    Returns:
        The same report on every process.

    Raises:
        TuckerizeError: The request cannot be carried out, or the loss is not finite.

    Example:
        >>> heal(HealRequest(folder="OUT", data="text.txt", output="HEALED"))  # doctest: +SKIP
    """
    progress = progress or SilentProgress()
    device, seconds = Device.parse(request.device), request.collective_timeout
    folder = OutputFolder(Path(request.output))
    with (
        process_group(
            lambda local: choose_device(device, local_rank=local),
            None if seconds is None else timedelta(seconds=seconds),
        ) as (processes, own_device),
        ExitStack() as held,
    ):

        def prepare() -> _Prepared:
            found = _prepare(request, processes)
            check_encoding(own_device, found.tucker.manifest.cores)
            if own_device.type == "cpu" and request.tp == 1 and not request.fsdp:
                _require_memory(found, processes)
            if processes.is_leader:
                claim = folder.claim(found.plan, overwrite=request.overwrite, read=progress.advance)
                held.enter_context(claim)
                require_space(folder.folder, _bytes_to_write(found))
            else:
                folder.join(found.plan)
            return found

        found = processes.leader_first(prepare)
        if folder.is_finished:  # by a run that was killed at its very end
            report = _read_report(folder.folder)
            processes.barrier()
            if processes.is_leader:
                folder.tidy()
            return report
        return _train(request, found, folder, processes, own_device, progress)


def _prepare(request: HealRequest, processes: Processes) -> _Prepared:
    """Check the request, and read the text."""
    tucker = TuckerCheckpoint.open(Path(request.folder))
    refuse_overlap(Path(request.output), tucker.folder)
    names = request.train.split(",") if request.train is not None else None
    wanted = None if names is None else [Part.parse(name.strip()) for name in names]
    parts = check_parts(tucker, wanted)
    replicas = _replicas(request, processes.size)
    if not 0 < request.teacher_share <= 1:
        raise UsageError(
            f"--teacher-share {request.teacher_share:g} is not in (0, 1]",
            hint="leave out --teacher to learn the text alone",
        )
    if not 0 < request.learning_rate < math.inf:
        raise UsageError(
            f"--learning-rate {request.learning_rate:g} is not a positive number",
            hint="leave it out for the default, 0.001",
        )
    if request.batch % replicas:
        raise UsageError(
            f"--batch {request.batch} windows cannot be shared evenly by {replicas} replicas",
            hint=f"use --batch {-(-request.batch // replicas) * replicas}",
        )
    teacher = None if request.teacher is None else open_teacher(request.teacher, tucker)
    learned, held = read_split_windows(
        [parse_source(text) for text in list_of_texts(request.data)],
        tucker.folder,
        tokens=request.tokens,
        window=request.window,
        seed=request.seed,
        held_out=_HELD_OUT,
        vocabulary=tucker.config.get("vocab_size"),
        chat_template=request.chat_template,
    )
    training_SL, validation_SL = learned.tokens_SL, held.tokens_SL
    per_step = request.batch * training_SL.shape[1]
    steps = max(1, round(request.tokens / per_step))
    turns = steps * request.batch / len(training_SL)
    notes = learned.messages
    notes += (f"every window of the text is read {turns:.1f} times",) if turns > 1.5 else ()
    schedule = Schedule(steps, request.batch, request.at_once, request.learning_rate, request.seed)
    plan = {
        "tuckerize_version": __version__,
        "tucker_manifest_sha256": tucker.manifest_sha256,
        "text_sha256": fingerprint(torch.cat([training_SL, validation_SL])),
        "train": sorted({*parts.values()}),
        "teacher": teacher and _identities(teacher.checkpoint),
        "teacher_share": teacher and request.teacher_share,
        "tokens": request.tokens,
        "batch": request.batch,
        "at_once": request.at_once,
        "learning_rate": request.learning_rate,
        "seed": request.seed,
    }
    return _Prepared(tucker, parts, teacher, training_SL, validation_SL, schedule, plan, notes)


def _identities(checkpoint: Checkpoint) -> dict[str, str]:
    return identities({name: file.path for name, file in checkpoint.files.items()})


def _replicas(request: HealRequest, processes: int) -> int:
    """Number of processes with tokens of their own."""
    if request.tp < 1 or processes % request.tp:
        raise ParallelError(
            f"{processes} processes are not a multiple of --tp {request.tp}",
            hint=f"start: torchrun --nproc-per-node {max(1, request.tp)} -m tuckerize heal ...",
        )
    if request.fsdp and (request.tp > 1 or processes == 1):
        raise ParallelError(
            f"--fsdp splits the model over replicas, of which there are {processes // request.tp} "
            f"with --tp {request.tp}",
            hint="use --fsdp under torchrun with several processes and without --tp",
        )
    return processes // request.tp


def _require_memory(found: _Prepared, processes: Processes) -> None:
    """Refuse what cannot fit on a CPU: all in float32, with gradients and moments of a part."""
    tensors = found.tucker.checkpoint.tensors
    values = sum(own.parameters for own in tensors.values() if own.dtype in TORCH_DTYPES)
    require_memory(
        (values + _COPIES * _trained_values(found)) * torch.float32.itemsize,
        "the model with gradients and moments",
        "train fewer parts (--train), or start fewer processes",
        processes=processes.local_size,
    )


def _trained_values(found: _Prepared) -> int:
    """Number of values that are trained."""
    count = 0
    for name in found.parts:
        factored = TensorName.find(name)
        stored = found.tucker.checkpoint.tensors[name]
        is_packed = factored is not None and factored.part == CorePart.PACKED_CODES
        core_type = CoreType.W4 if stored.dtype == "I32" else CoreType.W3
        count += 8 * stored.bytes // core_type.bits if is_packed else stored.parameters
    return count


def _work(request: HealRequest, found: _Prepared, replicas: int) -> float:
    """Floating-point operations of the training in one process."""
    manifest, schedule = found.tucker.manifest, found.schedule
    judged = len(schedule.validated) * found.validation_SL.numel()
    return training_work(
        manifest.after,
        active_share=found.tucker.family.routing(found.tucker.config).top_k
        / manifest.shape.experts,
        tokens=schedule.steps * schedule.batch * found.training_SL.shape[1] // replicas,
        judged=judged // replicas,
        forwards=4 if request.recompute else 3,
    )


def _bytes_to_write(found: _Prepared) -> int:
    """Bytes of the result, of the states of the run, and of the teacher's predictions."""
    tokens = found.training_SL.numel() + found.validation_SL.numel()
    taught = 0 if found.teacher is None else bytes_of_predictions(tokens)
    saved = 4 * _SAVED * _trained_values(found)
    return found.tucker.manifest.after.total_bytes + saved + taught


def _train(
    request: HealRequest,
    found: _Prepared,
    folder: OutputFolder,
    processes: Processes,
    device: torch.device,
    progress: Progress,
) -> HealReport:
    """Train, and write the best state."""
    started = time.monotonic()
    spread = Spread()
    if processes.size > 1:
        replicas = processes.size // request.tp
        mesh = make_mesh(device.type, tp=request.tp, cp=replicas, timeout=processes.timeout)
        spread = Spread(mesh, is_sharded=request.fsdp)
    windows = [Windows(found.training_SL), Windows(found.validation_SL)]
    if found.teacher is not None:
        tokens_SL = torch.cat([own.tokens_SL for own in windows])
        taught = predictions(found.teacher, tokens_SL, folder, processes, device, progress)
        both = Windows(tokens_SL, taught)
        windows = [both[: len(windows[0])], both[len(windows[0]) :]]
    if processes.is_leader:
        expected = duration(_work(request, found, processes.size // request.tp))
        announce(expected, "the training", device, progress)
    progress.stage("load the model")
    ready = make_ready(found.tucker, found.parts, device, spread)
    if request.recompute:
        ready.model.recompute()
    training = Training(
        model=ready.model,
        share=request.teacher_share,
        tensors=ready.tensors,
        schedule=found.schedule,
        data=windows[0],
        validation=windows[1],
        replicas=spread.replicas,
        reduced=spread.is_sharded,
        finish_backward=ready.sum_gradients,
        device=device,
        saved=SavedRun(folder, processes, spread.parts, spread.is_first),
        log_file=folder.folder / LOG,
        progress=progress,
    )
    history = training.run()
    output, notes = folder.folder, found.notes
    report = None
    if processes.is_leader:
        best = training.best()
        record = HealRecord(
            checkpoint=str(request.folder),
            tucker_manifest_sha256=found.tucker.manifest_sha256,
            trained=tuple(sorted({*found.parts.values()})),
            texts=tuple(list_of_texts(request.data)),
            teacher=None if request.teacher is None else str(request.teacher),
            parameters=best.parameters,
            steps=history.step,
            best_step=history.best_step,
            tokens=history.best_step * found.schedule.tokens(windows[0]),
            nats_before=history.first_nats,
            nats_after=history.best_nats,
        )
        # Before the end: the same command still continues where the log cannot be read.
        report = _report(output, record, time.monotonic() - started, notes)
        write_result(found.tucker, folder, best, record)
    processes.barrier()
    return report or _read_report(output)


def _read_report(output: Path) -> HealReport:
    """Report of a finished result."""
    record = read_tucker_manifest(output).healed
    if record is None:
        raise CheckpointError(f"{output} was not healed", hint="add --overwrite to begin anew")
    return _report(output, record)


def _report(
    output: Path, record: HealRecord, seconds: float = 0.0, notes: tuple[str, ...] = ()
) -> HealReport:
    lines = [json.loads(line) for line in (output / LOG).read_text(encoding="utf-8").splitlines()]
    return HealReport(
        output=str(output),
        trained=record.trained,
        parameters=record.parameters,
        steps=record.steps,
        best_step=record.best_step,
        tokens=record.tokens,
        seconds=seconds,
        nats_before=record.nats_before,
        nats_after=record.nats_after,
        curve=tuple(
            (line["step"], line["validation_nats"]) for line in lines if "validation_nats" in line
        ),
        notes=notes,
    )

"""Carry out a plan: compress layer after layer, copy the rest, write index and manifest last."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from tuckerize.calibration.calibration_pass import CalibrationPass, SavedStates, experts_call
from tuckerize.calibration.states import States
from tuckerize.calibration.tokens import DenseGroup
from tuckerize.checkpoint.files import FileRecord, describe_file, sha256_of
from tuckerize.checkpoint.identity import identities
from tuckerize.checkpoint.output import OutputFolder
from tuckerize.checkpoint.weight_set import CONFIG
from tuckerize.checkpoint.writer import copy_tensors, write_dense
from tuckerize.compression.calibrated import compress_layer
from tuckerize.compression.data_free import decompose_piece
from tuckerize.compression.factors import LayerFactors
from tuckerize.compression.gather import gathered
from tuckerize.compression.scales import notes_on_scales
from tuckerize.compression.target import LayerPiece
from tuckerize.compression.write import write_piece
from tuckerize.domain import StackResult
from tuckerize.errors import CheckpointError
from tuckerize.format.manifest import TuckerManifest, read_tucker_manifest
from tuckerize.format.records import LayerRecord, LayoutRecord, SourceRecord
from tuckerize.format.warnings import warnings_of
from tuckerize.parallel.processes import Processes
from tuckerize.pipeline.finish import finish_checkpoint, size_of_files
from tuckerize.planning.duration import work
from tuckerize.planning.plan import CopyPiece, Piece, Plan
from tuckerize.progress import Progress
from tuckerize.report.results import DecomposeReport, LayerOutcome
from tuckerize.version import __version__

_HIDDEN = "hidden"


def compress_model(
    plan: Plan,
    output: Path,
    *,
    model: str,
    device: torch.device,
    processes: Processes,
    progress: Progress,
    calibration: CalibrationPass | None = None,
) -> DecomposeReport | None:
    """Write the Tucker checkpoint of a plan to a claimed output folder.

    Pieces of work are shared out over the processes, the largest first; each is written atomically
    and recorded, so that an interrupted run continues, with identical bytes at the end.

    Args:
        plan: The plan.
        output: Folder that `OutputFolder.claim` took for this plan.
        model: The model as the user named it, for the manifest.
        device: Where the products run.
        processes: The processes of the run.
        progress: Shows how far the work is.
        calibration: The model and its text, for a plan with calibration; the processes share its
            layers.

    Returns:
        Report of the run, on process 0; None on the others.

    Raises:
        DecompositionError: A stack cannot be decomposed.
    """
    started = time.monotonic()
    folder = OutputFolder(output)
    is_finished = folder.is_finished
    processes.barrier()
    if is_finished:  # by a run that was killed at its very end
        if not processes.is_leader:
            return None
        folder.tidy()
        return _report(plan, read_tucker_manifest(output), output, started)
    pieces, notes = plan.pieces, _notes(plan)
    if calibration is not None:
        pieces = tuple(own for own in plan.pieces if not _is_calibrated(own))
        notes += _compress_calibrated(plan, calibration, output, progress)
    queue = sorted(pieces, key=lambda piece: work(plan, piece), reverse=True)
    done_before = sum(folder.record(piece.name) is not None for piece in queue)
    processes.barrier()
    progress.start(sum(work(plan, piece) for piece in queue))
    shown = 0
    for index in processes.queue(len(queue)):
        piece = queue[index]
        if folder.record(piece.name) is None:
            _record(plan, piece, folder, _carry_out(plan, piece, output, device))
        # Other processes took the pieces in between.
        progress.advance(sum(work(plan, p) for p in queue[shown : index + 1]), piece.name)
        shown = index + 1
    processes.barrier()
    progress.close()
    if not processes.is_leader:
        return None
    notes += plan.source.notes
    for piece in plan.layer_pieces:
        notes += folder.finished_record(piece.name).get("notes", ())
    manifest = _finish(plan, folder, model)
    return _report(plan, manifest, output, started, resumed=done_before, notes=notes)


def _report(
    plan: Plan,
    manifest: TuckerManifest,
    output: Path,
    started: float,
    *,
    resumed: int | None = None,
    notes: Sequence[str] = (),
) -> DecomposeReport:
    """Report of a run; all pieces were done before, unless their number is given."""
    return DecomposeReport(
        output=str(output),
        stacks=manifest.stacks,
        before=manifest.before,
        after=manifest.after,
        resumed_pieces=len(plan.pieces) if resumed is None else resumed,
        seconds=time.monotonic() - started,
        calibrated=tuple(
            LayerOutcome(
                layer=record.layer,
                neurons=record.neurons,
                output_error=record.output_error,
                predicted_error=record.predicted_error,
            )
            for record in manifest.calibrated
        ),
        predicted_kl=plan.predicted_kl,
        notes=tuple(notes),
        warnings=warnings_of(manifest),
    )


def _notes(plan: Plan) -> list[str]:
    """Notes for the user on the source."""
    family = plan.source.moe.family
    if not family.row.inferred:
        return []
    return [
        f"{family.model_type} is not in the table of families: names and router were found in the "
        f"tensors, experts in {family.experts_prefix(plan.source.moe.layers[0])}, router "
        f"{family.row.router}; transformers holds the experts in its standard form"
    ]


def _is_calibrated(piece: Piece) -> bool:
    return isinstance(piece, LayerPiece) and piece.calibration is not None


def _compress_calibrated(
    plan: Plan, calibration: CalibrationPass, output: Path, progress: Progress
) -> list[str]:
    """Write the layers of a plan in one pass over the calibration set; returns notes on the text.

    Every layer is recorded when its file is written, and the hidden states after it are saved, so
    that an interrupted run continues with the next layer.
    """
    folder = OutputFolder(output)
    states = SavedStates(folder.work_file("hidden.safetensors"))
    pieces = {piece.layer: piece for piece in plan.layer_pieces if _is_calibrated(piece)}
    sharing, device = calibration.sharing, calibration.model.device

    def load() -> tuple[int, States | None]:
        start, saved = states.load()
        if any(folder.record(piece.name) is None for own, piece in pieces.items() if own < start):
            return 0, None  # a layer has to be made again, and all states depend on it
        return start, States.of(saved)[_HIDDEN] if saved else None

    start, saved = sharing.of_first(load)
    progress.start(len(pieces))
    progress.advance(sum(layer < start for layer in pieces), "continued")
    hidden = calibration.own(saved.to(device) if saved else calibration.embed())
    for layer in range(start, max(pieces, default=-1) + 1):
        piece = pieces.get(layer)
        progress.stage(f"layer {layer}: tokens")
        hidden, record = _pass_layer(plan, calibration, layer, piece, hidden, output, progress)
        # The record first: a layer is done again where only its states are missing.
        if record is not None:
            _record(plan, pieces[layer], folder, record)
        whole = calibration.whole(hidden, len(calibration.windows_SL))
        if sharing.is_first:
            states.save(layer + 1, whole.named(_HIDDEN))
    progress.close()
    return list(calibration.notes)


def _pass_layer(
    plan: Plan,
    calibration: CalibrationPass,
    layer: int,
    piece: LayerPiece | None,
    hidden: States,
    output: Path,
    progress: Progress,
) -> tuple[States, dict[str, Any] | None]:
    """States after a layer, and on process 0 the record of its piece, if it has one.

    Nothing else of the layer outlives the call: the next one needs the memory.
    """
    if layer not in plan.source.moe.layers:
        return calibration.run_layer(layer, hidden, None), None
    groups = calibration.groups(layer)
    dense = calibration.dense(layer, groups)
    captured = calibration.capture(layer, hidden, len(calibration.windows_SL), dense)
    after = captured.after
    if piece is None:
        return after, None
    tokens = captured.tokens.split(calibration.scratch)
    del captured  # its tokens were copied
    compressed = compress_layer(
        calibration,
        piece,
        groups,
        dense,
        tokens,
        plan.weights,
        max_sweeps=plan.recipe.max_sweeps,
        progress=progress,
    )
    sharing = calibration.sharing
    whole = gathered(compressed, sharing)
    notes = [note for own in sharing.of_all(_notes_on(plan, layer, groups)) for note in own]
    record = _write(plan, piece, [whole], output, notes) if sharing.is_first else None
    if calibration.settings.sequential:
        module = calibration.module(layer, [group.tensors() for group in compressed.groups]).float()
        after = calibration.run_layer(layer, hidden, experts_call(module))
    return after, record


def _carry_out(plan: Plan, piece: Piece, output: Path, device: torch.device) -> dict[str, Any]:
    """Write the weight file of a copy or of a data-free piece; returns its record."""
    if isinstance(piece, LayerPiece):
        parts = decompose_piece(
            plan.source,
            piece,
            plan.weights,
            engine=plan.recipe.engine,
            max_sweeps=plan.recipe.max_sweeps,
            device=device,
        )
        notes: list[str] = []

        def noted() -> Iterator[LayerFactors]:
            for part in parts:
                notes.extend(_notes_on(plan, piece.layer, (group.dense for group in part.groups)))
                yield part

        return _write(plan, piece, noted(), output, notes)
    source = plan.source.checkpoint.files[piece.source_file]
    name = plan.weight_file(piece)
    written = _copy(plan, piece, output / name) if name else None
    return {
        "source": describe_file(source.path).model_dump(),
        "file": written and written.model_dump(),
    }


def _record(plan: Plan, piece: Piece, folder: OutputFolder, record: dict[str, Any]) -> None:
    """Record a finished piece, and the identities of the source files that it was read from.

    Raises:
        CheckpointError: The source was changed since the run was started.
    """
    if isinstance(piece, LayerPiece):
        read = plan.source.identities_of_layer(piece.layer)
    else:
        name = piece.source_file
        read = identities({name: plan.source.checkpoint.files[name].path})
    claimed = folder.claimed("weights")
    changed = [name for name, own in read.items() if claimed.get(name) != own]
    if changed:
        raise CheckpointError(
            f"{', '.join(changed)} of {plan.source.checkpoint.folder} was changed while it was "
            "being decomposed",
            hint="start again with --overwrite when nothing writes to the source",
        )
    files = [FileRecord(**record["file"])] if record["file"] else []
    folder.write_record(piece.name, {**record, "read_from": read}, files)


def _copy(plan: Plan, piece: CopyPiece, path: Path) -> FileRecord:
    checkpoint, file = plan.source.checkpoint, piece.source_file
    if piece.dequantize:
        return write_dense(path, checkpoint, file, piece.tensors, plan.weights.name)
    return copy_tensors(path, checkpoint.files[file], piece.tensors)


def _write(
    plan: Plan,
    piece: LayerPiece,
    parts: Iterable[LayerFactors],
    output: Path,
    notes: Sequence[str],
) -> dict[str, Any]:
    """Write the weight file of a piece; its record has notes that may come with the parts."""
    experts = plan.source.moe.family.experts_prefix(piece.layer)
    record = write_piece(output / str(plan.weight_file(piece)), piece, parts, experts)
    record["notes"] = [*record.get("notes", ()), *notes]
    return record


def _notes_on(plan: Plan, layer: int, groups: Iterable[DenseGroup]) -> list[str]:
    """Notes on dense experts of a quantized source."""
    if not plan.source.coding:
        return []
    return [note for group in groups for note in notes_on_scales(layer, group)]


def _finish(plan: Plan, folder: OutputFolder, model: str) -> TuckerManifest:
    """Write everything but the weights: other files, config, index, manifest, in this order."""
    records = [folder.finished_record(piece.name) for piece in plan.pieces]
    auto_map = plan.source.checkpoint.config.get("auto_map")
    files = [FileRecord(**record["file"]) for record in records if record["file"]]
    read = TypeAdapter(list[StackResult]).validate_python
    calibrated = [LayerRecord(**r["calibrated"]) for r in records if "calibrated" in r]
    stacks = [stack for record in records for stack in read(record.get("stacks", []))]
    stacks.sort(key=lambda stack: (stack.layer, stack.group))
    source, moe = plan.source.checkpoint, plan.source.moe
    rest = None if plan.recipe.dequantize_rest else plan.source.rest(plan.layers)
    manifest = TuckerManifest(
        tuckerize_version=__version__,
        family=moe.family.model_type,
        layout=LayoutRecord.of(moe.family),
        source=SourceRecord(
            model=model,
            config_sha256=sha256_of(source.folder / CONFIG),
            auto_map=auto_map if isinstance(auto_map, dict) else None,
            files=tuple(FileRecord(**record["source"]) for record in records if "source" in record),
        ),
        recipe=plan.recipe.model_dump(mode="json", exclude_none=True),
        dtype=plan.weights.name,
        cores=plan.cores,
        shape=moe.shape,
        group_size=plan.group_size,
        joint=plan.joint,
        stacks=tuple(stacks),
        calibrated=tuple(calibrated),
        before=plan.source.size,
        after=size_of_files(
            folder.folder,
            files,
            stacks,
            plan.source,
            plan.cores,
            dense=bool(plan.recipe.dequantize_rest),
        ),
        files=tuple(files),
    )
    return finish_checkpoint(folder, plan.source, manifest, rest)

"""Carry out a plan: decompose stack after stack, copy the rest, write index and manifest last."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from tuckerize.calibration.calibration_pass import CalibrationPass
from tuckerize.checkpoint.files import FileRecord, sha256_of, write_json
from tuckerize.checkpoint.other_files import copy_other_files
from tuckerize.checkpoint.output import OutputFolder
from tuckerize.checkpoint.reader import CONFIG, TORCH_DTYPES, WeightFile, measure_size
from tuckerize.checkpoint.writer import copy_tensors, describe_file, write_index, write_tensors
from tuckerize.compression.target import CompressionTarget, LayerPiece
from tuckerize.domain import Engine, StackResult, coupling_name, group_experts
from tuckerize.errors import located
from tuckerize.format.card import with_loader, write_hub_files
from tuckerize.format.config import TuckerQuantization, with_quantization
from tuckerize.format.manifest import LayerRecord, SourceRecord, TuckerManifest
from tuckerize.linalg.hooi import Decomposition, hooi
from tuckerize.linalg.rank_choice import rank_for_tolerance
from tuckerize.linalg.tensorly_engine import tensorly_tucker
from tuckerize.linalg.tucker import check_no_overflow, relative_residual
from tuckerize.parallel.processes import Processes
from tuckerize.pipeline.decompose_calibrated import compress_layers
from tuckerize.planning.estimate import work
from tuckerize.planning.plan import Piece, Plan
from tuckerize.progress import Progress
from tuckerize.report import DecomposeReport, LayerOutcome
from tuckerize.runtime.experts import named_tensors
from tuckerize.version import __version__

_ENGINES = {Engine.TUCKERIZE: hooi, Engine.TENSORLY: tensorly_tucker}


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
    and noted, so that a run that was interrupted continues, with identical bytes at the end.

    Args:
        plan: What to write.
        output: Folder that `OutputFolder.claim` took for this plan.
        model: What the user gave as the model, for the manifest.
        device: Where the products run.
        processes: The processes of the run.
        progress: Shows how far the work is.
        calibration: The model and its text, for a plan with calibration, in one process.

    Returns:
        What was done, on process 0; None on the others.

    Raises:
        DecompositionError: A stack cannot be decomposed.
    """
    started = time.monotonic()
    folder = OutputFolder(output)
    notes = _compress_calibrated(plan, calibration, output, progress)
    calibrated = plan.recipe.calibration is not None
    pieces = sorted(
        plan.copies if calibrated else plan.pieces,
        key=lambda piece: work(plan, piece),
        reverse=True,
    )
    done_before = sum(folder.record(piece.name) is not None for piece in pieces)
    processes.barrier()
    progress.start(sum(work(plan, piece) for piece in pieces))
    shown = 0
    for index in processes.queue(len(pieces)):
        piece = pieces[index]
        if folder.record(piece.name) is None:
            folder.write_record(piece.name, _carry_out(plan, piece, output, device))
        # Other processes took the pieces in between.
        progress.advance(sum(work(plan, p) for p in pieces[shown : index + 1]), piece.name)
        shown = index + 1
    processes.barrier()
    progress.close()
    if not processes.is_leader:
        return None
    manifest = _finish(plan, folder, model)
    return DecomposeReport(
        output=str(output),
        stacks=manifest.stacks,
        before=manifest.before,
        after=manifest.after,
        resumed_pieces=done_before,
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
    )


def _compress_calibrated(
    plan: Plan, calibration: CalibrationPass | None, output: Path, progress: Progress
) -> list[str]:
    """Write the layers of a plan with calibration; returns notes for the user."""
    if calibration is None or not plan.layer_pieces:
        return []
    return [*calibration.notes, *compress_layers(plan, calibration, output, progress)]


def _carry_out(plan: Plan, piece: Piece, output: Path, device: torch.device) -> dict[str, Any]:
    """Write the weight file of a piece; returns its record."""
    if isinstance(piece, LayerPiece):
        return _decompose_piece(plan, piece, output, device)
    source = plan.source.checkpoint.files[piece.source_file]
    name = plan.weight_file(piece)
    written = copy_tensors(output / name, source, piece.tensors) if name else None
    return {
        "source": describe_file(source.path).model_dump(),
        "file": written and written.model_dump(),
    }


def _decompose_piece(
    plan: Plan, piece: LayerPiece, output: Path, device: torch.device
) -> dict[str, Any]:
    prefix = plan.source.moe.family.experts_prefix(piece.layer)
    tensors: dict[str, Tensor] = {}
    records: list[StackResult] = []
    (coupling,) = piece.couplings
    for group, target in enumerate(piece.targets):
        experts = group_experts(plan.source.moe.shape, plan.group_size, group)
        stacks = [plan.source.stack(piece.layer, p, experts).to(device) for p in coupling]
        with located(f"layer {piece.layer}, group {group}, {coupling_name(coupling)}"):
            result = _factorise(plan, stacks, target)
        for projection, stack, factors in zip(coupling, stacks, result.tensors, strict=True):
            stored = factors.to(TORCH_DTYPES[plan.weights.name])
            for name, tensor in named_tensors(coupling, projection, stored):
                tensors[str(name.within(group, prefix))] = check_no_overflow(
                    tensor, plan.weights.name
                ).cpu()
            records.append(
                StackResult(
                    layer=piece.layer,
                    group=group,
                    projection=projection,
                    multilinear_rank=stored.rank,
                    relative_residual=relative_residual(stack, stored),
                    sweeps=result.sweeps,
                )
            )
    written = write_tensors(output / str(plan.weight_file(piece)), tensors)
    return {
        "file": written.model_dump(),
        "stacks": [asdict(record) for record in records],
    }


def _factorise(plan: Plan, stacks: list[Tensor], target: CompressionTarget) -> Decomposition:
    (rank,) = target.ranks.values()
    if target.tolerance is not None:
        # Rounding the factors to their type spends a part of the tolerance.
        rest = target.tolerance**2 - plan.weights.rounding**2
        rank = rank_for_tolerance(stacks, rest**0.5)
    engine = _ENGINES[plan.recipe.engine]
    return engine(stacks, rank, max_sweeps=plan.recipe.max_sweeps)


def _finish(plan: Plan, folder: OutputFolder, model: str) -> TuckerManifest:
    """Write everything but the weights: other files, config, index, manifest, in this order."""
    records = [folder.record(piece.name) or {} for piece in plan.pieces]
    files = [FileRecord(**record["file"]) for record in records if record["file"]]
    read = TypeAdapter(list[StackResult]).validate_python
    calibrated = [LayerRecord(**r["calibrated"]) for r in records if "calibrated" in r]
    stacks = [stack for record in records for stack in read(record.get("stacks", []))]
    stacks.sort(key=lambda stack: (stack.layer, stack.group))
    output, source, moe = folder.folder, plan.source.checkpoint, plan.source.moe
    copy_other_files(source.folder, output)
    opened = [WeightFile.open(output / file.name) for file in files]
    headers = {name: place.header for file in opened for name, place in file.tensors.items()}
    manifest = TuckerManifest(
        tuckerize_version=__version__,
        family=moe.family.model_type,
        source=SourceRecord(
            model=model,
            config_sha256=sha256_of(source.folder / CONFIG),
            auto_map=source.config.get("auto_map"),
            files=tuple(FileRecord(**record["source"]) for record in records if "source" in record),
        ),
        recipe=plan.recipe.model_dump(mode="json", exclude_none=True),
        dtype=plan.weights.name,
        shape=moe.shape,
        group_size=plan.group_size,
        joint=plan.joint,
        stacks=tuple(stacks),
        calibrated=tuple(calibrated),
        before=plan.source.size,
        after=measure_size(headers, is_routed=moe.is_routed),
        files=tuple(files),
    )
    config = source.config
    quantization = TuckerQuantization.of(manifest, moe.family)
    write_json(output / CONFIG, with_quantization(with_loader(config), quantization))
    write_hub_files(source.folder, output, manifest, config)
    write_index(output, opened)
    folder.finish(manifest.model_dump(mode="json"))
    return manifest

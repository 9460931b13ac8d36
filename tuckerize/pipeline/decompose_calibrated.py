"""Compress a model layer by layer for a calibration text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tuckerize.calibration.calibration_pass import CalibrationPass, SavedStates, experts_call
from tuckerize.calibration.compress import CompressedGroup, compress_group
from tuckerize.calibration.layer_profile import LayerProfile
from tuckerize.calibration.moments import gather_moments
from tuckerize.calibration.profile_pass import profile_model
from tuckerize.calibration.refine import Refinement, refine, relative_output_error
from tuckerize.calibration.text import fingerprint
from tuckerize.calibration.tokens import DenseGroup, LayerTokens
from tuckerize.checkpoint.output import OutputFolder
from tuckerize.checkpoint.reader import TORCH_DTYPES
from tuckerize.checkpoint.writer import write_tensors
from tuckerize.compression.target import LayerPiece
from tuckerize.domain import StackResult
from tuckerize.errors import located
from tuckerize.format.manifest import LayerRecord, pack_neurons
from tuckerize.format.tucker_checkpoint import factors_of
from tuckerize.linalg.tucker import (
    TuckerFactors,
    check_no_overflow,
    orthonormalised,
    relative_residual,
)
from tuckerize.names import TensorName
from tuckerize.planning.plan import Plan, make_plan
from tuckerize.progress import Progress
from tuckerize.recipe import Recipe
from tuckerize.runtime.experts import TuckerExperts, named_tensors


class _Compressed(NamedTuple):
    """A layer as it will be stored."""

    groups: list[CompressedGroup]
    tensors: list[dict[TensorName, Tensor]]
    refinement: Refinement
    notes: list[str]


def draft_plan(recipe: Recipe, calibration: CalibrationPass) -> Plan:
    """The plan of a recipe before its budget is shared out: what an output folder is claimed for.

    Raises:
        TuckerizeError: As `make_plan`.
    """
    return make_plan(calibration.source, recipe, text=fingerprint(calibration.windows_SL))


def plan_calibrated(recipe: Recipe, calibration: CalibrationPass, progress: Progress) -> Plan:
    """The plan of a recipe with calibration; profiles the model where a budget is to be shared out.

    Raises:
        TuckerizeError: As `make_plan`.
    """
    profiles: Sequence[LayerProfile] = ()
    if any(rule.keep is not None for rule in recipe.rules):
        profiles = profile_model(calibration, progress)
    return make_plan(calibration.source, recipe, profiles, fingerprint(calibration.windows_SL))


def compress_layers(
    plan: Plan, calibration: CalibrationPass, output: Path, progress: Progress
) -> list[str]:
    """Write the weight files of all layer pieces of a plan; returns notes on layers for the user.

    One pass over the text. Every layer is noted when its file is written, and the hidden states
    behind it are kept, so that an interrupted run continues with the next layer.

    Args:
        plan: What to write.
        calibration: The model and its text.
        output: Folder that `OutputFolder.claim` took for this plan.
        progress: Shows how far the pass is.
    """
    run = calibration
    folder = OutputFolder(output)
    states = SavedStates(folder.work_file("hidden.safetensors"))
    pieces = {piece.layer: piece for piece in plan.layer_pieces}
    start, saved = states.load(run.model.device)
    progress.start(len(pieces))
    progress.advance(sum(layer < start for layer in pieces), "continued")
    hidden_SLI = saved["hidden"] if saved else run.embed()
    for layer in range(start, max(pieces) + 1):
        hidden_SLI, record = _pass_layer(plan, run, layer, pieces.get(layer), hidden_SLI, output)
        # The record first: a layer is done again where only its states are missing.
        if record is not None:
            folder.write_record(pieces[layer].name, record)
            progress.advance(1, pieces[layer].name)
        states.save(layer + 1, {"hidden": hidden_SLI})
    progress.close()
    records = [folder.record(piece.name) or {} for piece in pieces.values()]
    return [note for record in records for note in record["notes"]]


def _pass_layer(
    plan: Plan,
    run: CalibrationPass,
    layer: int,
    piece: LayerPiece | None,
    hidden_SLI: Tensor,
    output: Path,
) -> tuple[Tensor, dict[str, Any] | None]:
    """Hidden states behind a layer, shape (S, L, I), and the record of its piece, if it has one.

    All else that was made of the layer is gone when this returns: the next needs the memory.
    """
    if layer not in run.source.moe.layers:
        return run.run_layer(layer, hidden_SLI, None), None
    groups = run.groups(layer)
    dense = run.module([group.as_tensors() for group in groups])
    tokens, behind_SLI = run.capture(layer, hidden_SLI, experts_call(dense))
    if piece is None:
        return behind_SLI, None
    compressed = _compress_layer(plan, piece, run, groups, dense, tokens)
    record = _write(plan, piece, groups, compressed, output)
    if run.settings.sequential:
        wide = [{n: t.float() for n, t in own.items()} for own in compressed.tensors]
        behind_SLI = run.run_layer(layer, hidden_SLI, experts_call(run.module(wide)))
    return behind_SLI, record


def _compress_layer(
    plan: Plan,
    piece: LayerPiece,
    run: CalibrationPass,
    groups: list[DenseGroup],
    dense: TuckerExperts,
    tokens: LayerTokens,
) -> _Compressed:
    steps = run.settings.refine
    fit, held_out = tokens.split()
    compressed, rare = [], []
    for index, (group, target) in enumerate(zip(groups, piece.targets, strict=True)):
        moments = gather_moments(group, fit, activation=run.activation)
        few = (moments.routed_E < group.shape.intermediate).nonzero()[:, 0] + group.experts.start
        rare += few.tolist()
        with located(f"layer {piece.layer}, group {index}"):
            compressed.append(
                compress_group(
                    group,
                    fit,
                    moments,
                    target,
                    max_sweeps=plan.recipe.max_sweeps,
                    activation=run.activation,
                )
            )

    def dense_output(part: LayerTokens) -> Tensor:
        with torch.no_grad():
            output_TI: Tensor = dense(*part)
        return output_TI

    module = run.module([group.tensors() for group in compressed])
    if piece.targets[0].is_dense(groups[0].shape) or not steps or not len(held_out.x_TI):
        unrefined = relative_output_error(module, held_out, dense_output(held_out))
        refinement = Refinement(unrefined, unrefined, kept=False)
    else:
        refinement = refine(module, fit, held_out, dense_output, steps=steps)
    dtype = TORCH_DTYPES[plan.weights.name]
    stored = [
        {n: check_no_overflow(t.to(dtype), plan.weights.name) for n, t in own.items()}
        for own in _orthonormal_groups(module, compressed)
    ]
    notes = []
    if rare:
        notes.append(
            f"layer {piece.layer}: experts {', '.join(map(str, rare))} saw fewer than "
            f"{groups[0].shape.intermediate} tokens; tokens of the whole layer fill up"
        )
    return _Compressed(compressed, stored, refinement, notes)


def _orthonormal_groups(
    module: TuckerExperts, compressed: Sequence[CompressedGroup]
) -> list[dict[TensorName, Tensor]]:
    """The tensors of a layer with orthonormal columns in every factor, as the format has them."""
    groups = []
    for group, shapes in zip(module.groups, compressed, strict=True):
        tensors = {TensorName.parse(n): value.detach() for n, value in group.named_parameters()}
        own: dict[TensorName, Tensor] = {}
        for coupling in shapes.target.couplings:
            for projection in coupling:
                factors = _orthonormal(factors_of(tensors, projection))
                own.update(named_tensors(coupling, projection, factors, shapes.widths))
        groups.append(own)
    return groups


def _orthonormal(factors: TuckerFactors) -> TuckerFactors:
    """The same tensor with orthonormal columns in every factor, the rest taken into the core."""
    core, factor_of = factors.core, list(factors.factors)
    for mode, factor in enumerate(factor_of):
        if factor is not None:
            factor_of[mode], mixing = orthonormalised(factor)
            core = torch.tensordot(mixing, core.movedim(mode, 0), dims=1).movedim(0, mode)
    return TuckerFactors(core.contiguous(), *factor_of)


def _write(
    plan: Plan,
    piece: LayerPiece,
    groups: list[DenseGroup],
    compressed: _Compressed,
    output: Path,
) -> dict[str, Any]:
    """Write the weight file of a layer; returns its record."""
    prefix = plan.source.moe.family.experts_prefix(piece.layer)
    named: dict[str, Tensor] = {}
    results: list[StackResult] = []
    kept = []
    for index, (group, own, tensors) in enumerate(
        zip(groups, compressed.groups, compressed.tensors, strict=True)
    ):
        named.update({str(n.within(index, prefix)): t.cpu() for n, t in tensors.items()})
        results += _results(piece, index, group, own, tensors)
        if own.kept is not None:
            kept.append(pack_neurons(own.kept.mask(group.shape.intermediate).numpy()))
    written = write_tensors(output / str(plan.weight_file(piece)), named)
    refinement = compressed.refinement
    error = refinement.error_after if refinement.kept else refinement.error_before
    record = LayerRecord(
        layer=piece.layer,
        neurons=piece.targets[0].neurons,
        kept=tuple(kept),
        output_error=None if error != error else error,  # noqa: PLR0124
        predicted_error=piece.predicted_error,
        refined=refinement.kept,
    )
    return {
        "file": written.model_dump(),
        "stacks": [asdict(result) for result in results],
        "calibrated": record.model_dump(mode="json"),
        "notes": compressed.notes,
    }


def _results(
    piece: LayerPiece,
    index: int,
    group: DenseGroup,
    compressed: CompressedGroup,
    tensors: Mapping[TensorName, Tensor],
) -> list[StackResult]:
    results = []
    places_EK = compressed.kept and compressed.kept.places_EK
    for coupling, rank in compressed.target.ranks.items():
        for projection in coupling:
            stored = factors_of(tensors, projection)
            residual = relative_residual(group.stacks[projection], stored, places_EK)
            results.append(
                StackResult(
                    layer=piece.layer,
                    group=index,
                    projection=projection,
                    multilinear_rank=rank,
                    relative_residual=residual,
                    sweeps=compressed.sweeps[projection],
                )
            )
    return results

"""The `inspect` command: facts of a model or a plan, from headers and configuration only."""

from __future__ import annotations

from pathlib import Path

from tuckerize.calibration.calibration_pass import CalibrationPass
from tuckerize.checkpoint.hub import resolve_model
from tuckerize.checkpoint.output import MANIFEST
from tuckerize.checkpoint.reader import Checkpoint
from tuckerize.compression.target import LayerPiece
from tuckerize.domain import Projection, Size, coupling_name
from tuckerize.format.config import find_quantization
from tuckerize.format.consistency import carries_loader, check_loadable
from tuckerize.format.manifest import available_shardings
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.format.warnings import warnings_of
from tuckerize.moe.source import SourceModel
from tuckerize.planning.duration import plan_duration
from tuckerize.planning.plan import Plan
from tuckerize.report.checkpoint import InspectReport, TuckerFacts
from tuckerize.report.plans import PlanReport, StackPlan

# Hidden states are kept in float32.
_STATE_BYTES = 4


def inspect(model: str | Path) -> InspectReport:
    """Describe a dense MoE checkpoint or a Tucker checkpoint.

    Args:
        model: Folder, Hugging Face id in the local cache, or short name; or a Tucker checkpoint.

    Raises:
        CheckpointError: It is neither, or engines would not load it as a whole.

    Example:
        >>> inspect("DeepSeek-V2-Lite").size.routed_parameters  # doctest: +SKIP
    """
    folder = resolve_model(str(model))
    checkpoint = Checkpoint.open(folder)
    if (folder / MANIFEST).exists() or find_quantization(checkpoint.config) is not None:
        return _describe_tucker(TuckerCheckpoint.open(folder))
    source = SourceModel.open(checkpoint)
    moe = source.moe
    return InspectReport(
        model=str(folder),
        family=moe.family.model_type,
        layers=moe.layers,
        shape=moe.shape,
        top_k=moe.routing.top_k,
        shared_experts=moe.shared_experts,
        dtype=moe.dtype,
        size=source.size,
        coding=source.coding,
        notes=source.notes,
    )


def describe_plan(plan: Plan, peak: int) -> PlanReport:
    """Sizes that a plan will store, and its estimated memory and time.

    Args:
        plan: The plan.
        peak: Bytes that one process will need.
    """
    before = plan.source.size
    stacks = [stack for piece in plan.layer_pieces for stack in _describe_piece(plan, piece)]
    saved_bytes = sum(stack.bytes_before - stack.bytes_after for stack in stacks)
    dense = len(plan.layers) * len(Projection) * plan.source.moe.shape.parameters
    stored = sum(piece.stored_parameters(plan.group_shape) for piece in plan.layer_pieces)
    after = Size(
        routed_parameters=before.routed_parameters - dense + stored,
        routed_bytes=before.routed_bytes - saved_bytes,
        total_parameters=before.total_parameters - dense + stored,
        total_bytes=before.total_bytes - saved_bytes + _bytes_of_dequantizing(plan),
    )
    return PlanReport(tuple(stacks), before, after, peak, plan_duration(plan), plan.predicted_kl)


def _bytes_of_dequantizing(plan: Plan) -> int:
    """Bytes that the weights grow by that are written dense and not compressed."""
    quantized, bits = plan.source.checkpoint.quantized, plan.weights.bits
    headers = [
        quantized[name].header
        for piece in plan.copies
        if piece.dequantize
        for name in piece.tensors
        if name in quantized
    ]
    return sum(header.parameters * bits // 8 - header.bytes for header in headers)


def bytes_to_write(plan: Plan, calibration: CalibrationPass | None) -> int:
    """Bytes of the files that a plan certainly needs, with the hidden states of a calibration."""
    report = describe_plan(plan, peak=0)
    unsure = sum(stack.bytes_after for stack in report.stacks if stack.tolerance is not None)
    states = 0
    if calibration is not None:
        states = calibration.windows_SL.numel() * plan.source.moe.shape.hidden * _STATE_BYTES
    return report.after.total_bytes - unsure + states


def _describe_piece(plan: Plan, piece: LayerPiece) -> list[StackPlan]:
    shape = plan.group_shape
    return [
        StackPlan(
            layer=piece.layer,
            group=group,
            projection=coupling_name(coupling),
            multilinear_rank=rank if target.tolerance is None else None,
            tolerance=target.tolerance,
            bytes_before=plan.source.stored_bytes(piece.layer, coupling) // len(piece.targets),
            bytes_after=target.stored_bytes(shape, coupling, plan.weights),
        )
        for group, target in enumerate(piece.targets)
        for coupling, rank in target.ranks.items()
    ]


def _describe_tucker(tucker: TuckerCheckpoint) -> InspectReport:
    check_loadable(tucker)
    manifest = tucker.manifest
    layers = tucker.family.moe_layers(tucker.config, tucker.checkpoint.tensors)
    return InspectReport(
        model=str(tucker.folder),
        family=manifest.family,
        layers=layers,
        shape=manifest.shape,
        top_k=tucker.family.routing(tucker.config).top_k,
        shared_experts=tucker.family.shared_experts(tucker.config),
        dtype=manifest.dtype,
        size=manifest.after,
        tucker=TuckerFacts(
            source=manifest.source.model if manifest.source else None,
            layers=manifest.layers,
            before=manifest.before,
            largest_residual=manifest.largest_residual,
            shardings=tuple(available_shardings(tucker.folder)),
            carries_loader=carries_loader(tucker),
            warnings=warnings_of(manifest),
            cores=manifest.cores,
        ),
    )

"""Weight files of compressed layers, and the records of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from tuckerize.checkpoint.writer import write_tensors
from tuckerize.compression.factors import GroupFactors, LayerFactors
from tuckerize.compression.target import LayerPiece
from tuckerize.domain import StackResult
from tuckerize.format.records import LayerRecord, pack_neurons


def write_piece(
    path: Path, piece: LayerPiece, parts: Iterable[LayerFactors], experts: str
) -> dict[str, Any]:
    """Write the weight file of a piece.

    Args:
        path: The file.
        piece: The piece.
        parts: Its groups, in their order, rounded to the stored type; all at once, or one by one so
            that the dense stacks of one are in memory at a time.
        experts: Module of the layer's routed experts.

    Returns:
        JSON values for the manifest: `file`, `stacks`, and `calibrated` and `notes` of a
        calibrated piece.
    """
    tensors: dict[str, Tensor] = {}
    stacks: list[StackResult] = []
    record: dict[str, Any] = {}
    for part in parts:
        for group in part.groups:
            tensors |= {
                str(n.within(group.index, experts)): t.cpu() for n, t in group.tensors().items()
            }
            stacks += _results(part.layer, group)
        if piece.calibration is not None:
            record = {
                "calibrated": _layer_record(piece, part).model_dump(mode="json"),
                "notes": list(part.notes),
            }
    written = write_tensors(path, tensors)
    return {
        "file": written.model_dump(),
        "stacks": [asdict(stack) for stack in stacks],
        **record,
    }


def _results(layer: int, group: GroupFactors) -> list[StackResult]:
    return [
        StackResult(
            layer=layer,
            group=group.index,
            projection=projection,
            multilinear_rank=group.rank(projection),
            relative_residual=group.residual(projection),
            sweeps=group.sweeps[projection],
        )
        for projection in group.dense.stacks
    ]


def _layer_record(piece: LayerPiece, layer: LayerFactors) -> LayerRecord:
    kept = [
        pack_neurons(group.kept.mask(group.dense.shape.intermediate).numpy())
        for group in layer.groups
        if group.kept is not None
    ]
    return LayerRecord(
        layer=layer.layer,
        neurons=piece.targets[0].neurons,
        kept=tuple(kept),
        output_error=layer.output_error,
        predicted_error=piece.predicted_error,
        refined=layer.refined,
    )

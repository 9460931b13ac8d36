"""Notes on experts of a quantized source whose scales may be wrong."""

from __future__ import annotations

import torch

from tuckerize.calibration.tokens import DenseGroup

# Trained experts differ by less; a forgotten or foreign scale is off by far more.
_FAR = 8.0


def notes_on_scales(layer: int, group: DenseGroup) -> list[str]:
    """Name the experts whose weights are far larger or smaller than their siblings'.

    Args:
        layer: Index of the layer.
        group: Dense experts of the layer.
    """
    notes: list[str] = []
    for projection in group.stacks:
        matrices = (group.matrix(projection, place) for place in range(len(group.experts)))
        rms_E = torch.stack([own.float().square().mean().sqrt() for own in matrices])
        usual = float(rms_E.median())
        far_E = (rms_E > _FAR * usual) | (rms_E * _FAR < usual)
        notes += (
            f"layer {layer}, expert {group.experts[place]}: the rms of {projection} is "
            f"{float(rms_E[place]):.2g}, that of its siblings {usual:.2g}: its scale may be wrong "
            "in the source"
            for place in far_E.nonzero().flatten().tolist()
        )
    return notes

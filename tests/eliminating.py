"""Elimination of the neurons of experts that are there together."""

from __future__ import annotations

from torch import Tensor

from tuckerize.linalg.selection import Elimination, Eliminator


def eliminate(moments_EHH: Tensor, down_EHI: Tensor) -> Elimination:
    """Order of the neurons of all experts."""
    eliminator = Eliminator(moments_EHH.shape[1])
    for moment_HH, down_HI in zip(moments_EHH, down_EHI, strict=True):
        eliminator.add(moment_HH, down_HI)
    return eliminator.of_all()

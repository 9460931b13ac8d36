"""Factors of all experts, from those of the processes that share them."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from tuckerize.compression.factors import GroupFactors, LayerFactors
from tuckerize.domain import Projection
from tuckerize.linalg.quantise import QuantisedMatrices
from tuckerize.linalg.selection import KeptNeurons
from tuckerize.linalg.sharing import Sharing
from tuckerize.linalg.tucker import TuckerFactors, squared_norm


def gathered(layer: LayerFactors, sharing: Sharing) -> LayerFactors:
    """A layer with the factors of all experts; the dense ones are still each process's own.

    Relative residuals, which need the dense ones, are measured.
    """
    if sharing.size == 1:
        return layer
    return replace(layer, groups=tuple(_gathered(group, sharing) for group in layer.groups))


def _gathered(group: GroupFactors, sharing: Sharing) -> GroupFactors:
    residuals = {projection: _residual(group, projection, sharing) for projection in group.factors}
    kept = group.kept
    if kept is not None:
        widths = (width for own in sharing.of_all(kept.widths) for width in own)
        kept = KeptNeurons(sharing.gather(kept.places_EK), tuple(widths))
    return replace(
        group,
        factors={p: _whole(own, sharing) for p, own in group.factors.items()},
        kept=kept,
        quantised={
            p: own if group.factors[p].U_E is not None else _whole_codes(own, sharing)
            for p, own in group.quantised.items()
        },
        biases={
            p: bias if p == Projection.DOWN else sharing.gather(bias)
            for p, bias in group.biases.items()
        },
        residuals=residuals,
    )


def _residual(group: GroupFactors, projection: Projection, sharing: Sharing) -> float:
    """Relative residual of the stack of all experts."""
    dense = group.dense
    matrices = (dense.matrix(projection, place) for place in range(dense.shape.experts))
    total = sum(map(squared_norm, matrices))
    own = group.residual(projection)
    both = torch.tensor([own**2 * total if total else 0.0, total], dtype=torch.float64)
    missed, total = sharing.sum(both).tolist()
    return math.sqrt(missed / total) if total else 0.0


def _whole(factors: TuckerFactors, sharing: Sharing) -> TuckerFactors:
    if factors.core.is_meta:  # its codes have the values
        experts = sharing.total(len(factors.core))
        return replace(factors, core=factors.core.new_empty(experts, *factors.core.shape[1:]))
    if factors.U_E is None:
        return replace(factors, core=sharing.gather(factors.core))
    return replace(factors, U_E=sharing.gather(factors.U_E))


def _whole_codes(own: QuantisedMatrices, sharing: Sharing) -> QuantisedMatrices:
    return replace(own, codes=sharing.gather(own.codes), scales=sharing.gather(own.scales))

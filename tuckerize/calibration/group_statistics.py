"""Statistics of a group of experts on the tokens, gathered expert by expert for a profile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from tuckerize.calibration.moments import GroupMoments, gather_moments
from tuckerize.calibration.tokens import DenseGroup, LayerTokens
from tuckerize.linalg.selection import Elimination, Eliminator
from tuckerize.linalg.sharing import ALONE, Sharing
from tuckerize.progress import Stage, silent
from tuckerize.runtime.activations import Activation

ELIMINATED_EXPERTS = 8
"""Experts of a group whose neurons are eliminated one after another in a profile."""


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """Statistics of all experts of a group; moments of neurons, which are large, are not kept.

    Attributes:
        group: The dense experts; this process's.
        moments: Their moments.
        elimination: Order of their neurons, of all processes.
    """

    group: DenseGroup
    moments: GroupMoments
    elimination: Elimination

    @classmethod
    def gather(
        cls,
        group: DenseGroup,
        tokens: LayerTokens,
        *,
        activation: Activation,
        stage: Stage = silent,
        sharing: Sharing = ALONE,
    ) -> Self:
        """Go through the experts once.

        Args:
            group: The dense experts.
            tokens: Tokens of the layer.
            activation: From gate and up to neurons.
            stage: Is told the experts, with shares of all of them as efforts.
            sharing: The processes that share the group.
        """
        count = sharing.total(len(group.experts))
        sampled, own = spread(count, ELIMINATED_EXPERTS), sharing.own(count)
        eliminator = Eliminator(group.shape.intermediate)
        moments = gather_moments(
            group,
            tokens,
            activation=activation,
            neurons=eliminator.add,
            whole=[expert - own.start for expert in sampled if own.start <= expert < own.stop],
            stage=stage,
            sharing=sharing,
        )
        found = eliminator.of_all(sharing)
        if len(sampled) < count:
            energies_EH = sharing.gather(moments.energy_EH * moments.row_norms_EH)
            found = extended(found, sampled, energies_EH.cpu())
        return cls(group, moments, found)


def extended(found: Elimination, sampled: list[int], energies_EH: Tensor) -> Elimination:
    """The elimination of all experts, of which some are known.

    Neurons of the others go by their own energy. What the rest makes up for is as with the experts
    that are known: the n-th neuron costs as large a part of the n-th energy.

    Args:
        found: That of some experts.
        sampled: Which they are.
        energies_EH: Output energy of every neuron of all experts by itself, shape (E, H).
    """
    costs_EH, order_EH = energies_EH.double().sort(dim=1, stable=True)
    known = costs_EH[sampled].sum(0)
    costs_EH *= found.costs_EH.sum(0) / known.clamp_min(torch.finfo(known.dtype).tiny)
    order_EH[sampled], costs_EH[sampled] = found.order_EH, found.costs_EH
    return Elimination(order_EH, costs_EH)


def spread(length: int, count: int) -> list[int]:
    """Middles of `count` equal parts of a range, or all indices of a shorter one."""
    count = min(count, length)
    return [(2 * part + 1) * length // (2 * count) for part in range(count)]

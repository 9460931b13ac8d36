"""Statistics of a group of experts on the tokens, gathered expert by expert for a profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from tuckerize.calibration.moments import GroupMoments, gather_moments
from tuckerize.calibration.tokens import DenseGroup, LayerTokens
from tuckerize.linalg.selection import Elimination, Eliminator
from tuckerize.linalg.sharing import ALONE, Sharing
from tuckerize.progress import Stage, silent
from tuckerize.runtime.activations import Activation


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """Statistics of all experts of a group; moments of neurons, which are large, are not kept.

    Attributes:
        group: The dense experts; this process's.
        moments: Their moments.
        elimination: Order of their neurons, of all processes.
        output_energies: Energy of the outputs of each of this process's experts.
    """

    group: DenseGroup
    moments: GroupMoments
    elimination: Elimination
    output_energies: Sequence[float]

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
        eliminator, energies = Eliminator(), list[float]()

        def take(moment_HH: Tensor, down_HI: Tensor) -> None:
            energies.append(eliminator.add(moment_HH, down_HI))

        moments = gather_moments(
            group, tokens, activation=activation, neurons=take, stage=stage, sharing=sharing
        )
        return cls(group, moments, eliminator.of_all(sharing), energies)

"""Compress one group of experts so that its outputs stay right: select neurons, factor, refit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tuckerize.calibration.moments import GroupMoments, refit_moments
from tuckerize.calibration.tokens import DenseGroup, LayerTokens
from tuckerize.compression.target import CompressionTarget
from tuckerize.domain import DOWN, Mode, MultilinearRank, Projection, StackShape
from tuckerize.linalg.gram import leading_eigenvectors
from tuckerize.linalg.selection import KeptNeurons, all_neurons, eliminate, refit_down
from tuckerize.linalg.tucker import TuckerFactors
from tuckerize.linalg.weighted import weighted_tucker
from tuckerize.names import TensorName
from tuckerize.runtime.experts import Activation, TuckerExperts, named_tensors


@dataclass(frozen=True, slots=True)
class CompressedGroup:
    """A group of experts as factors.

    Attributes:
        factors: The Tucker tensor of every projection; gate and up share the object U_I if joint.
        kept: Neurons that every expert kept; None if all.
        target: What it was compressed to.
        sweeps: Sweeps of weighted least squares for every projection.
    """

    factors: Mapping[Projection, TuckerFactors]
    kept: KeptNeurons | None
    target: CompressionTarget
    sweeps: Mapping[Projection, int]

    @property
    def widths(self) -> tuple[int, ...] | None:
        """Neurons of every expert; None if all."""
        return None if self.kept is None else self.kept.widths

    def tensors(self) -> dict[TensorName, Tensor]:
        """The tensors by their names relative to the group."""
        return {
            name: tensor
            for coupling in self.target.couplings
            for projection in coupling
            for name, tensor in named_tensors(
                coupling, projection, self.factors[projection], self.widths
            )
        }


def compress_group(
    group: DenseGroup,
    tokens: LayerTokens,
    moments: GroupMoments,
    target: CompressionTarget,
    *,
    max_sweeps: int,
    activation: Activation,
) -> CompressedGroup:
    """Compress a group of experts for the tokens that it sees.

    Neurons are selected by what the combined output loses without them; gate and up are factored
    for the inputs of every expert; down is refitted to the outputs of the dense experts and then
    projected on the principal components of the group's combined output.

    Args:
        group: The dense experts, in float32.
        tokens: Tokens of the layer.
        moments: What `gather_moments` gave for them.
        target: What to compress to.
        max_sweeps: Sweeps of weighted least squares at most.
        activation: Between gate and up.

    Raises:
        MultilinearRankError: A core size does not fit its stack.
        NonFiniteError: A stack holds NaN or infinity.
    """
    kept = None
    stacks, ranks = dict(group.stacks), target.ranks
    if target.neurons < group.shape.intermediate:
        down_EHI = group.stacks[Projection.DOWN]
        kept = eliminate(moments.neurons_EHH, down_EHI).kept(
            target.neurons, multiple=target.multiple, equal=target.equal_widths
        )
        stacks = {projection: kept.rows(stack) for projection, stack in stacks.items()}
        # All work is on stacks as wide as the widest expert, with rows of zeros.
        ranks = {c: r._replace(intermediate=max(kept.widths)) for c, r in ranks.items()}
    factors: dict[Projection, TuckerFactors] = {}
    sweeps = dict.fromkeys(Projection, 0)
    for coupling in target.couplings[:-1]:
        found = weighted_tucker(
            [stacks[projection] for projection in coupling],
            moments.hidden_EII,
            ranks[coupling],
            max_sweeps=max_sweeps,
        )
        factors.update(zip(coupling, found.tensors, strict=True))
        sweeps.update(dict.fromkeys(coupling, found.sweeps))
    neurons_EKK = moments.neurons_EHH
    if kept is not None or any(
        factors[p].rank != MultilinearRank(*group.shape) for p in (Projection.GATE, Projection.UP)
    ):
        neurons_EKK, cross_EKH = refit_moments(
            group,
            tokens,
            lambda place: (
                factors[Projection.GATE].expand_slice(place),
                factors[Projection.UP].expand_slice(place),
            ),
            activation=activation,
        )
        stacks[Projection.DOWN] = refit_down(
            neurons_EKK,
            cross_EKH,
            group.stacks[Projection.DOWN],
            kept or all_neurons(group.shape),
        )
    down_rank = ranks[DOWN]
    down_shape = StackShape(*stacks[Projection.DOWN].shape)
    if down_rank.truncated_modes(down_shape) == (Mode.HIDDEN,):
        so_far = {**factors, Projection.DOWN: TuckerFactors(stacks[Projection.DOWN])}
        output_II = _output_moment(
            group, tokens, CompressedGroup(so_far, kept, target, sweeps), activation
        )
        U_I = leading_eigenvectors(output_II, down_rank.hidden)
        factors[Projection.DOWN] = TuckerFactors(stacks[Projection.DOWN] @ U_I, U_I=U_I)
    else:
        factors[Projection.DOWN], sweeps[Projection.DOWN] = _weighted_down(
            stacks[Projection.DOWN], neurons_EKK, down_rank, max_sweeps
        )
    return CompressedGroup(factors, kept, target, sweeps)


def _weighted_down(
    stack_EKI: Tensor, neurons_EKK: Tensor, rank: MultilinearRank, max_sweeps: int
) -> tuple[TuckerFactors, int]:
    """Down with a truncated expert or intermediate mode: its inputs are the neurons."""
    flipped = MultilinearRank(rank.expert, rank.hidden, rank.intermediate)
    found = weighted_tucker(
        [stack_EKI.mT.contiguous()], neurons_EKK, flipped, max_sweeps=max_sweeps
    )
    factors = found.tensors[0]
    core = factors.core.mT.contiguous()
    return TuckerFactors(core, factors.U_E, U_H=factors.U_I, U_I=factors.U_H), found.sweeps


def _output_moment(
    group: DenseGroup, tokens: LayerTokens, compressed: CompressedGroup, activation: Activation
) -> Tensor:
    """Upper triangle's symmetric second moment of a group's combined output, shape (I, I)."""
    output_TI = group_output(compressed.tensors(), group.experts, tokens, activation)
    return output_TI.T @ output_TI


def group_output(
    tensors: Mapping[TensorName, Tensor],
    experts: range,
    tokens: LayerTokens,
    activation: Activation,
) -> Tensor:
    """Combined routed output of one group alone, shape (T, I)."""
    module = TuckerExperts([tensors], group_size=len(experts), activation=activation)
    output_TI: Tensor = module(tokens.x_TI, tokens.experts_Tk - experts.start, tokens.weights_Tk)
    return output_TI

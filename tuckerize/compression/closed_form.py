"""Closed-form compression of a group for the tokens that its experts see, without gradients.

Select neurons, factor gate and up for the inputs of every expert, refit down to the outputs of the
dense experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from tuckerize.calibration.moments import (
    input_moments,
    neuron_moments,
    refit_moments,
    second_moment,
)
from tuckerize.calibration.rows import joined
from tuckerize.calibration.tokens import LayerTokens
from tuckerize.compression.factors import GroupFactors, GroupStep
from tuckerize.domain import DOWN, GATE_UP, Mode, MultilinearRank, Projection, StackShape
from tuckerize.linalg.gram import leading_eigenvectors
from tuckerize.linalg.selection import Eliminator, KeptNeurons, all_neurons, refit_down
from tuckerize.linalg.sharing import ALONE, Sharing
from tuckerize.linalg.tucker import TuckerFactors
from tuckerize.linalg.weighted import weighted_tucker
from tuckerize.names import TensorName
from tuckerize.progress import Stage, scaled, silent, told
from tuckerize.runtime.activations import Activation
from tuckerize.runtime.experts import TuckerExperts

TOKENS_AT_ONCE = 8192
"""Tokens that run through a layer at once."""

EFFORTS = {"neurons": 15.0, "gate and up": 15.0, "down": 10.0}
"""Work on a group, in steps of refinement; roughly, for what is left of the time."""


def closed_form(
    tokens: LayerTokens,
    *,
    activation: Activation,
    max_sweeps: int,
    stage: Stage = silent,
    sharing: Sharing = ALONE,
) -> GroupStep:
    """The step that compresses a group without gradients: select, factor, refit.

    Args:
        tokens: Tokens of the layer to fit.
        activation: From gate and up to neurons.
        max_sweeps: Upper bound on the sweeps of weighted least squares.
        stage: Is told what begins.
        sharing: The processes that share the group.
    """

    def treat(group: GroupFactors) -> GroupFactors:
        eliminating = scaled(stage, EFFORTS["neurons"])
        kept = select_neurons(group, tokens, sharing, activation=activation, stage=eliminating)
        if kept is not None:
            group = with_neurons(group, kept)
        stage("gate and up")
        group = factor_gate_up(group, tokens, sharing, max_sweeps=max_sweeps, stage=stage)
        stage("down", EFFORTS["gate and up"])
        group = refit(group, tokens, sharing, activation=activation, max_sweeps=max_sweeps)
        stage("refinement", EFFORTS["down"])
        return group

    return treat


def select_neurons(
    group: GroupFactors,
    tokens: LayerTokens,
    sharing: Sharing,
    *,
    activation: Activation,
    stage: Stage = silent,
) -> KeptNeurons | None:
    """The neurons without which the combined output would lose most; None if all are kept.

    Args:
        group: A group of dense experts.
        tokens: Tokens of the layer to fit.
        sharing: The processes that share the group.
        activation: From gate and up to neurons.
        stage: Is told the experts, with shares of all of them as efforts.
    """
    target = group.target
    if target.neurons == group.dense.shape.intermediate:
        return None
    eliminator = Eliminator(group.dense.shape.intermediate)
    moments = neuron_moments(group.dense, tokens, activation=activation)
    experts = told(moments, group.dense.shape.experts, stage, "moments and elimination")
    for place, moment_HH in enumerate(experts):
        eliminator.add(moment_HH, group.dense.matrix(Projection.DOWN, place))
    elimination = eliminator.of_all(sharing)
    kept = elimination.kept(target.neurons, multiple=target.multiple, equal=target.equal_widths)
    return kept.of_experts(sharing.own(len(kept.widths)))


def with_neurons(group: GroupFactors, kept: KeptNeurons) -> GroupFactors:
    """A group of dense experts with some of their neurons."""
    slim = {p: TuckerFactors(kept.rows(stack)) for p, stack in group.dense.stacks.items()}
    biases = {
        p: bias if p == Projection.DOWN else kept.rows(bias[..., None])[..., 0]
        for p, bias in group.dense.biases.items()
    }
    return replace(group, factors=slim, kept=kept, biases=biases)


def factor_gate_up(
    group: GroupFactors, tokens: LayerTokens, sharing: Sharing, *, max_sweeps: int, stage: Stage
) -> GroupFactors:
    """Factor gate and up by least squares weighted with the moments of every expert's inputs.

    Raises:
        MultilinearRankError: A core size does not fit its stack.
        NonFiniteError: A stack holds NaN or infinity.
    """
    factors, sweeps = dict(group.factors), dict(group.sweeps)
    moments_EII: Tensor | None = None
    for coupling in group.target.couplings:
        stacks = [factors[projection].core for projection in coupling]
        rank = _work_rank(group, group.target.ranks[coupling])
        if coupling == DOWN or not rank.truncated_modes(_whole_shape(stacks[0], sharing)):
            continue
        if moments_EII is None:
            moments_EII = input_moments(group.dense, tokens)
        found = weighted_tucker(
            stacks, moments_EII, rank, max_sweeps=max_sweeps, stage=stage, sharing=sharing
        )
        factors.update(zip(coupling, found.tensors, strict=True))
        sweeps.update(dict.fromkeys(coupling, found.sweeps))
    return replace(group, factors=factors, sweeps=sweeps)


def refit(
    group: GroupFactors,
    tokens: LayerTokens,
    sharing: Sharing,
    *,
    activation: Activation,
    max_sweeps: int,
) -> GroupFactors:
    """Refit down to the outputs of the dense experts, then factor it.

    Where the hidden mode alone is truncated, U_I spans the principal components of the group's
    combined output; otherwise down is factored by weighted least squares.

    Raises:
        MultilinearRankError: A core size does not fit its stack.
    """
    down_EKI = group.factors[Projection.DOWN].core
    rank = _work_rank(group, group.target.ranks[DOWN])
    truncated = rank.truncated_modes(_whole_shape(down_EKI, sharing))
    inputs_EKK: Tensor | None = None  # moments of down's inputs
    if truncated and truncated != (Mode.HIDDEN,):
        experts, width, _ = down_EKI.shape
        inputs_EKK = down_EKI.new_empty(experts, width, width)
    if group.kept is not None or any(group.factors[p].truncated for p in GATE_UP):
        down_EKI = refit_down(
            _refit_moments(group, tokens, activation, inputs_EKK),
            group.dense.stacks[Projection.DOWN],
            group.kept or all_neurons(group.dense.shape),
        )
    elif inputs_EKK is not None:
        moments = neuron_moments(group.dense, tokens, activation=activation)
        for own_KK, moment_KK in zip(inputs_EKK, moments, strict=True):
            own_KK.copy_(moment_KK)
    down, sweeps = TuckerFactors(down_EKI), 0
    if inputs_EKK is not None:
        down, sweeps = _weighted_down(down_EKI, inputs_EKK, rank, max_sweeps, sharing)
    elif truncated:
        wide = _with_down(group, TuckerFactors(down_EKI))
        output_II = _output_moment(wide, tokens, activation, sharing)
        U_I = leading_eigenvectors(output_II, rank.hidden)
        down = TuckerFactors(down_EKI @ U_I, U_I=U_I)
    return replace(_with_down(group, down), sweeps={**group.sweeps, Projection.DOWN: sweeps})


def _refit_moments(
    group: GroupFactors, tokens: LayerTokens, activation: Activation, noted_EKK: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Moments that refitting down needs, of one expert after another; the first may be noted."""
    for place in range(group.dense.shape.experts):

        def compressed(_: int, x_NI: Tensor, own: int = place) -> tuple[Tensor, Tensor]:
            return group.gate_up(own, x_NI)

        part = group.dense.part(place)
        now_1KK, cross_1KH = refit_moments(part, tokens, compressed, activation=activation)
        if noted_EKK is not None:
            noted_EKK[place] = now_1KK[0]
        yield now_1KK[0], cross_1KH[0]


def _work_rank(group: GroupFactors, rank: MultilinearRank) -> MultilinearRank:
    """Core sizes of stacks as wide as the widest expert, with rows of zeros for the others."""
    return rank if group.kept is None else rank._replace(intermediate=group.kept.width)


def _whole_shape(stack_EKI: Tensor, sharing: Sharing) -> StackShape:
    """Sizes of a stack of all processes' experts."""
    return StackShape(sharing.total(len(stack_EKI)), *stack_EKI.shape[1:])


def _with_down(group: GroupFactors, down: TuckerFactors) -> GroupFactors:
    return replace(group, factors={**group.factors, Projection.DOWN: down})


def _weighted_down(
    stack_EKI: Tensor,
    neurons_EKK: Tensor,
    rank: MultilinearRank,
    max_sweeps: int,
    sharing: Sharing,
) -> tuple[TuckerFactors, int]:
    """Down with a truncated expert or intermediate mode: its inputs are the neurons."""
    flipped = MultilinearRank(rank.expert, rank.hidden, rank.intermediate)
    found = weighted_tucker(
        [stack_EKI.mT.contiguous()], neurons_EKK, flipped, max_sweeps=max_sweeps, sharing=sharing
    )
    factors = found.tensors[0]
    core = factors.core.mT.contiguous()
    return TuckerFactors(core, factors.U_E, U_H=factors.U_I, U_I=factors.U_H), found.sweeps


def _output_moment(
    group: GroupFactors, tokens: LayerTokens, activation: Activation, sharing: Sharing
) -> Tensor:
    """Second moment of a group's combined output without biases, shape (I, I)."""
    down = TensorName.bias(Projection.DOWN)  # it is not in the span of U_I
    tensors = {name: tensor for name, tensor in group.tensors().items() if name != down}
    own_TI = group_output(tensors, group.dense.experts, tokens, activation)
    return second_moment(own_TI, sharing)


def group_output(
    tensors: Mapping[TensorName, Tensor],
    experts: range,
    tokens: LayerTokens,
    activation: Activation,
) -> Tensor:
    """Combined routed output of some experts of one group alone, shape (T, I)."""
    module = TuckerExperts([tensors], group_size=len(experts), activation=activation)
    own = tokens._replace(experts_Tk=tokens.experts_Tk - experts.start)
    return in_batches(lambda part: module(*part), own)


def in_batches(
    output: Callable[[LayerTokens], Tensor], tokens: LayerTokens, folder: Path | None = None
) -> Tensor:
    """Outputs of tokens, shape (T, I), not of all at once: their rows would take much memory.

    Args:
        output: Computes the outputs of some.
        tokens: The tokens.
        folder: Of a file that holds the outputs; see `Rows`.
    """
    count = len(tokens.x_TI)
    firsts = range(0, max(1, count), TOKENS_AT_ONCE)
    parts = (output(tokens.part(slice(first, first + TOKENS_AT_ONCE))) for first in firsts)
    return joined(parts, count, folder)

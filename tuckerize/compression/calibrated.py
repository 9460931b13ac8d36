"""Calibrated compression of a layer, so that its outputs stay right on a calibration set.

For every group: select neurons, factor gate and up for the inputs of every expert, refit down to
the outputs of the dense experts. Then, for the whole layer: refine cores and factors by gradient
steps, and give all factors orthonormal columns again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tuckerize.calibration.calibration_pass import CalibrationPass
from tuckerize.calibration.moments import (
    input_moments,
    neuron_moments,
    refit_moments,
    second_moment,
)
from tuckerize.calibration.refine import Refinement, batch_and_steps, refine, relative_output_error
from tuckerize.calibration.tokens import DenseGroup, LayerTokens
from tuckerize.compression.factors import (
    GroupFactors,
    GroupStep,
    LayerFactors,
    Step,
    compress,
    for_each_group,
    rounded_group,
    rounding,
)
from tuckerize.compression.parts import in_parts
from tuckerize.compression.quantise import QuantiseForTokens
from tuckerize.compression.target import LayerPiece
from tuckerize.domain import (
    DOWN,
    GATE_UP,
    Mode,
    MultilinearRank,
    Projection,
    StackShape,
    WeightType,
)
from tuckerize.format.tucker_checkpoint import biases_of, factors_of
from tuckerize.linalg.gram import leading_eigenvectors
from tuckerize.linalg.selection import Eliminator, KeptNeurons, all_neurons, refit_down, widened
from tuckerize.linalg.sharing import ALONE, Sharing
from tuckerize.linalg.tucker import TuckerFactors, orthonormalised
from tuckerize.linalg.weighted import weighted_tucker
from tuckerize.names import TensorName
from tuckerize.progress import LayerProgress, Progress, Stage, silent
from tuckerize.runtime.activations import Activation
from tuckerize.runtime.experts import TuckerExperts

# Work on a group, in steps of refinement; roughly, for what is left of the time.
_EFFORTS = {"neurons": 15.0, "gate and up": 15.0, "down": 10.0}


def compress_layer(
    calibration: CalibrationPass,
    piece: LayerPiece,
    groups: list[DenseGroup],
    dense: TuckerExperts,
    tokens: LayerTokens,
    weights: WeightType,
    *,
    max_sweeps: int,
    progress: Progress,
) -> LayerFactors:
    """Compress a layer for the tokens that its experts see.

    Args:
        calibration: The model and its calibration set.
        piece: Targets of its groups.
        groups: The dense experts of this process, in float32.
        dense: The same as a module.
        tokens: Tokens before the routed experts of the layer.
        weights: Type of the stored cores and factors.
        max_sweeps: Upper bound on the sweeps of weighted least squares.
        progress: Shows the stages of the layer, which counts as one.

    Raises:
        DecompositionError: A stack cannot be decomposed.
    """
    fit, held_out = tokens.split()
    activation = calibration.activation(piece.layer)
    _, num_steps = batch_and_steps(len(fit.x_TI), calibration.settings.refine)
    effort = len(groups) * sum(_EFFORTS.values()) + num_steps
    stages = LayerProgress(progress, piece.layer, effort)
    sharing = calibration.sharing
    treat = closed_form(
        fit,
        activation=activation,
        max_sweeps=max_sweeps,
        stage=stages.stage,
        sharing=sharing,
    )
    quantise = piece.cores and QuantiseForTokens(
        weights, piece.cores, fit, held_out, dense, calibration
    )
    steps: list[Step] = [
        for_each_group(treat),
        Refine(calibration, dense, fit, held_out, stages.stage),
        orthonormalise(sharing),
        *([quantise] if quantise else []),
        rounding(weights),
    ]
    if quantise and not calibration.held:
        quantise_group, round_group = quantise.of_group(piece.layer), rounded_group(weights)

        def treat_part(part: GroupFactors) -> GroupFactors:
            if part.kept is not None:
                part = refit(
                    with_neurons(part, part.kept),
                    fit,
                    ALONE,
                    activation=activation,
                    max_sweeps=max_sweeps,
                )
            return round_group(quantise_group(part))

        def treat_parts(group: GroupFactors) -> GroupFactors:
            stages.stage("moments and elimination of neurons")
            kept = select_neurons(group, fit, sharing, activation=activation)
            stages.stage("down and rounding", _EFFORTS["neurons"])
            return in_parts(group, kept, treat_part)

        steps = [for_each_group(treat_parts), quantise.measured]
    layer = LayerFactors(
        piece.layer,
        tuple(
            GroupFactors.of(index, group, target)
            for index, (group, target) in enumerate(zip(groups, piece.targets, strict=True))
        ),
        notes=_note_on_rare_experts(piece.layer, fit, calibration.source.moe.shape),
    )
    layer = compress(layer, steps)
    stages.finish(f"layer {piece.layer}")
    return layer


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
        stage("moments and elimination of neurons")
        kept = select_neurons(group, tokens, sharing, activation=activation)
        if kept is not None:
            group = with_neurons(group, kept)
        stage("gate and up", _EFFORTS["neurons"])
        group = factor_gate_up(group, tokens, sharing, max_sweeps=max_sweeps, stage=stage)
        stage("down", _EFFORTS["gate and up"])
        group = refit(group, tokens, sharing, activation=activation, max_sweeps=max_sweeps)
        stage("refinement", _EFFORTS["down"])
        return group

    return treat


def select_neurons(
    group: GroupFactors, tokens: LayerTokens, sharing: Sharing, *, activation: Activation
) -> KeptNeurons | None:
    """The neurons without which the combined output would lose most; None if all are kept."""
    target = group.target
    if target.neurons == group.dense.shape.intermediate:
        return None
    eliminator = Eliminator()
    moments = neuron_moments(group.dense, tokens, activation=activation)
    for place, moment_HH in enumerate(moments):
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
    neurons_EKK: Tensor | None = None
    if group.kept is not None or any(group.factors[p].truncated for p in GATE_UP):
        neurons_EKK, cross_EKH = refit_moments(
            group.dense,
            tokens,
            group.gate_up,
            activation=activation,
        )
        down_EKI = refit_down(
            neurons_EKK,
            cross_EKH,
            group.dense.stacks[Projection.DOWN],
            group.kept or all_neurons(group.dense.shape),
        )
    rank = _work_rank(group, group.target.ranks[DOWN])
    truncated = rank.truncated_modes(_whole_shape(down_EKI, sharing))
    down, sweeps = TuckerFactors(down_EKI), 0
    if truncated == (Mode.HIDDEN,):
        wide = _with_down(group, TuckerFactors(down_EKI))
        output_II = _output_moment(wide, tokens, activation, sharing)
        U_I = leading_eigenvectors(output_II, rank.hidden)
        down = TuckerFactors(down_EKI @ U_I, U_I=U_I)
    elif truncated:
        if neurons_EKK is None:
            moments = neuron_moments(group.dense, tokens, activation=activation)
            neurons_EKK = torch.stack([*moments])
        down, sweeps = _weighted_down(down_EKI, neurons_EKK, rank, max_sweeps, sharing)
    return replace(_with_down(group, down), sweeps={**group.sweeps, Projection.DOWN: sweeps})


@dataclass(frozen=True, slots=True)
class Refine:
    """Step that refines cores and factors against the layer's own output by gradient descent.

    Attributes:
        calibration: The model and its calibration set.
        dense: The dense experts of the layer.
        fit: Tokens to fit.
        held_out: Validation set; its error decides whether the steps are kept.
        stage: Is told the steps.
    """

    calibration: CalibrationPass
    dense: TuckerExperts
    fit: LayerTokens
    held_out: LayerTokens
    stage: Stage = silent

    def __call__(self, layer: LayerFactors) -> LayerFactors:
        """Refine a layer, and measure its output error on the validation set."""
        run = self.calibration
        module = run.module(layer.layer, [_own_tensors(own) for own in layer.groups])
        steps = run.settings.refine
        shape = run.source.moe.shape._replace(experts=run.group_size)
        dense = all(group.target.is_dense(shape) for group in layer.groups)
        if dense or not steps or not len(self.held_out.x_TI):
            target_TI = self._dense_output(self.held_out)
            error = relative_output_error(module, self.held_out, target_TI, run.sharing)
            found = Refinement(error, error, kept=False)
        else:
            found = refine(
                module,
                self.fit,
                self.held_out,
                self._dense_output,
                steps=steps,
                stage=self.stage,
                sharing=run.sharing,
            )
        error = found.error_after if found.kept else found.error_before
        groups = [
            _with_tensors(
                group, {TensorName.parse(n): t.detach() for n, t in own.named_parameters()}
            )
            for group, own in zip(layer.groups, module.groups, strict=True)
        ]
        return replace(
            layer,
            groups=tuple(groups),
            output_error=None if math.isnan(error) else error,
            refined=found.kept,
        )

    @torch.no_grad()
    def _dense_output(self, tokens: LayerTokens) -> Tensor:
        return self.calibration.output(self.dense, tokens)


def _own_tensors(group: GroupFactors) -> dict[TensorName, Tensor]:
    """Tensors of a group that can be changed: those that are still the dense ones are copied."""
    dense = {own.data_ptr() for own in (*group.dense.stacks.values(), *group.dense.biases.values())}
    return {
        name: tensor.clone() if tensor.data_ptr() in dense else tensor
        for name, tensor in group.tensors().items()
    }


def orthonormalise(sharing: Sharing = ALONE) -> Step:
    """The step that gives factors orthonormal columns, the rest taken into the cores."""
    return lambda layer: layer.with_factors(partial(_orthonormal, sharing=sharing))


def _orthonormal(factors: TuckerFactors, sharing: Sharing) -> TuckerFactors:
    core, factor_of = factors.core, list(factors.factors)
    for mode, factor in enumerate(factor_of):
        if factor is not None and mode == Mode.EXPERT:
            whole, mixing = orthonormalised(sharing.gather(factor))
            factor_of[mode] = whole[sharing.own(len(whole))]
        elif factor is not None:
            factor_of[mode], mixing = orthonormalised(factor)
        if factor is not None:
            core = torch.tensordot(mixing, core.movedim(mode, 0), dims=1).movedim(0, mode)
    return TuckerFactors(core.contiguous(), *factor_of)


def _work_rank(group: GroupFactors, rank: MultilinearRank) -> MultilinearRank:
    """Core sizes of stacks as wide as the widest expert, with rows of zeros for the others."""
    return rank if group.kept is None else rank._replace(intermediate=group.kept.width)


def _whole_shape(stack_EKI: Tensor, sharing: Sharing) -> StackShape:
    """Sizes of a stack of all processes' experts."""
    return StackShape(sharing.total(len(stack_EKI)), *stack_EKI.shape[1:])


def _with_down(group: GroupFactors, down: TuckerFactors) -> GroupFactors:
    return replace(group, factors={**group.factors, Projection.DOWN: down})


def _with_tensors(group: GroupFactors, tensors: Mapping[TensorName, Tensor]) -> GroupFactors:
    factors = {projection: factors_of(tensors, projection) for projection in group.factors}
    biases = biases_of(tensors)
    if group.kept is not None:  # as wide as the widest expert, which may be another process's
        width = group.kept.width
        for projection, own in factors.items():
            if own.U_H is None:
                factors[projection] = replace(own, core=widened(own.core, width))
        biases = {p: b if p == Projection.DOWN else widened(b, width) for p, b in biases.items()}
    return replace(group, factors=factors, biases=biases)


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
    output_TI: Tensor = module(tokens.x_TI, tokens.experts_Tk - experts.start, tokens.weights_Tk)
    return output_TI


def _note_on_rare_experts(layer: int, tokens: LayerTokens, shape: StackShape) -> tuple[str, ...]:
    """A note on the experts whose second moments their own tokens cannot fill."""
    unknowns = max(shape.intermediate, shape.hidden)
    routed_E = torch.bincount(tokens.experts_Tk.flatten(), minlength=shape.experts)
    rare = (routed_E < unknowns).nonzero()[:, 0].tolist()
    if not rare:
        return ()
    return (
        f"layer {layer}: experts {', '.join(map(str, rare))} saw fewer than {unknowns} tokens; "
        "tokens of the whole layer fill up",
    )

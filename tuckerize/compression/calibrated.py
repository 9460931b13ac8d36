"""Calibrated compression of a layer, so that its outputs stay right on a calibration set.

Every group is compressed in closed form. Then, for the whole layer: refine cores and factors by
gradient steps, and give all factors orthonormal columns again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tuckerize.calibration.calibration_pass import CalibrationPass
from tuckerize.calibration.refine import Refinement, batch_and_steps, refine, relative_output_error
from tuckerize.calibration.tokens import DenseGroup, LayerTokens
from tuckerize.compression.closed_form import (
    EFFORTS,
    closed_form,
    in_batches,
    refit,
    select_neurons,
    with_neurons,
)
from tuckerize.compression.factors import (
    GroupFactors,
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
from tuckerize.domain import Mode, Projection, StackShape
from tuckerize.format.tucker_checkpoint import biases_of, factors_of
from tuckerize.linalg.selection import widened
from tuckerize.linalg.sharing import ALONE, Sharing
from tuckerize.linalg.tucker import TuckerFactors, orthonormalised
from tuckerize.names import TensorName
from tuckerize.progress import LayerProgress, Progress, Stage, scaled, silent
from tuckerize.runtime.experts import TuckerExperts
from tuckerize.weight_types import WeightType


def compress_layer(
    calibration: CalibrationPass,
    piece: LayerPiece,
    groups: list[DenseGroup],
    dense: TuckerExperts,
    tokens: tuple[LayerTokens, LayerTokens],
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
        tokens: Tokens before the routed experts of the layer: those to fit, and the validation
            set.
        weights: Type of the stored cores and factors.
        max_sweeps: Upper bound on the sweeps of weighted least squares.
        progress: Shows the stages of the layer, which counts as one.

    Raises:
        DecompositionError: A stack cannot be decomposed.
    """
    fit, held_out = tokens
    activation = calibration.activation(piece.layer)
    _, num_steps = batch_and_steps(len(fit.x_TI), calibration.settings.refine)
    effort = len(groups) * sum(EFFORTS.values()) + num_steps
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
            eliminating = scaled(stages.stage, EFFORTS["neurons"])
            kept = select_neurons(group, fit, sharing, activation=activation, stage=eliminating)
            rounding_parts = scaled(stages.stage, EFFORTS["gate and up"] + EFFORTS["down"])
            return in_parts(group, kept, treat_part, stage=rounding_parts)

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
        output = partial(self.calibration.output, self.dense)
        return in_batches(output, tokens, self.calibration.scratch)


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

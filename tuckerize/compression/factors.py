"""Factors of the experts of a layer, and the steps that make them.

A step takes the factors of a layer and returns smaller, better or rounded ones; a compression is a
list of steps. Before the first one, the dense stacks are their own factors, every mode full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from tuckerize.calibration.tokens import DenseGroup
from tuckerize.checkpoint.reader import TORCH_DTYPES
from tuckerize.compression.target import CompressionTarget
from tuckerize.domain import GATE_UP, MultilinearRank, Projection, coupling_name
from tuckerize.errors import located
from tuckerize.format.cores import core_tensors
from tuckerize.linalg.quantise import QuantisedMatrices
from tuckerize.linalg.selection import KeptNeurons
from tuckerize.linalg.tucker import TuckerFactors, check_no_overflow, relative_residual
from tuckerize.names import TensorKind, TensorName
from tuckerize.runtime.experts import named_biases, named_tensors
from tuckerize.weight_types import WeightType


@dataclass(frozen=True, slots=True)
class GroupFactors:
    """One group of experts as factors.

    Attributes:
        index: Index of the group in the layer.
        dense: The dense experts.
        target: Sizes that they are compressed to.
        factors: The Tucker tensor of every projection; coupled ones share their U_I.
        kept: Neurons that every expert kept; None if all.
        sweeps: Sweeps of HOOI or weighted least squares by projection.
        quantised: Cores that are quantised, in the orientation of `format.cores`; their values are
            those of the Tucker tensors' cores.
        biases: Biases of every projection, zero beyond the width of an expert; empty if the experts
            have none.
        residuals: Relative residuals, where they are known already.
    """

    index: int
    dense: DenseGroup
    target: CompressionTarget
    factors: Mapping[Projection, TuckerFactors]
    kept: KeptNeurons | None
    sweeps: Mapping[Projection, int]
    quantised: Mapping[Projection, QuantisedMatrices] = field(default_factory=dict)
    biases: Mapping[Projection, Tensor] = field(default_factory=dict)
    residuals: Mapping[Projection, float] = field(default_factory=dict)

    @classmethod
    def of(cls, index: int, dense: DenseGroup, target: CompressionTarget) -> GroupFactors:
        """A group before the first step; its cores have no values where the experts are on disk."""
        cores = dense.as_tensors()
        factors = {p: TuckerFactors(cores[TensorName.core(p)]) for p in dense.stacks}
        sweeps = dict.fromkeys(factors, 0)
        return cls(index, dense, target, factors, None, sweeps, biases=dense.biases)

    @property
    def name(self) -> str:
        """Name for messages: `group 0`, with the projections if they are a part of the layer's."""
        couplings = self.target.couplings
        lone = f", {coupling_name(couplings[0])}" if len(couplings) == 1 else ""
        return f"group {self.index}{lone}"

    @property
    def widths(self) -> tuple[int, ...] | None:
        """Neurons of every expert; None if all."""
        return None if self.kept is None else self.kept.widths

    def tensors(self) -> dict[TensorName, Tensor]:
        """Stored tensors by names relative to the group."""
        found = {
            part: stored
            for coupling in self.target.couplings
            for projection in coupling
            for name, tensor in named_tensors(
                coupling, projection, self.factors[projection], self.widths
            )
            for part, stored in self._stored(name, tensor)
        }
        for projection, bias in self.biases.items():
            found |= named_biases(projection, bias, self.widths)
        return found

    def gate_up(self, place: int, x_NI: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up of tokens in one expert, before the activation, each (N, K).

        Args:
            place: Index of the expert in the group.
            x_NI: Its tokens.
        """
        gate_NK, up_NK = (x_NI @ self.factors[p].expand_slice(place).T for p in GATE_UP)
        if not self.biases:
            return gate_NK, up_NK
        gate_K, up_K = (self.biases[projection][place] for projection in GATE_UP)
        return gate_NK + gate_K, up_NK + up_K

    def _stored(self, name: TensorName, tensor: Tensor) -> Iterable[tuple[TensorName, Tensor]]:
        """A tensor, or codes and scales in place of a core that is quantised."""
        found = self.quantised.get(name.projection)
        if name.kind != TensorKind.CORE or found is None:
            return [(name, tensor)]
        if name.expert is not None and self.widths is not None:
            found = found.of_expert(name.expert)
            width = self.widths[name.expert]
            down = name.projection == Projection.DOWN
            found = found.narrowed(inputs=width) if down else found.narrowed(outputs=width)
        return core_tensors(name, found)

    def rank(self, projection: Projection) -> MultilinearRank:
        """Core sizes of a stack, r_H being the mean over experts of different widths."""
        rank = self.factors[projection].rank
        return rank if self.kept is None else rank._replace(intermediate=self.target.neurons)

    def residual(self, projection: Projection) -> float:
        """Relative residual of a stack."""
        if projection in self.residuals:
            return self.residuals[projection]
        kept_EK = self.kept and self.kept.places_EK
        return relative_residual(self.dense.stacks[projection], self.factors[projection], kept_EK)

    def with_factors(self, change: Callable[[TuckerFactors], TuckerFactors]) -> GroupFactors:
        """The same with every Tucker tensor changed."""
        return replace(self, factors={p: change(f) for p, f in self.factors.items()})


@dataclass(frozen=True, slots=True)
class LayerFactors:
    """A layer, or some groups or projections of it, as factors.

    Attributes:
        layer: Index of the layer.
        groups: Its groups.
        output_error: Relative output error (unitless) on the validation set; None without any.
        refined: Whether gradient steps lowered it.
        notes: Notes for the user.
    """

    layer: int
    groups: tuple[GroupFactors, ...]
    output_error: float | None = None
    refined: bool = False
    notes: tuple[str, ...] = ()

    def with_factors(self, change: Callable[[TuckerFactors], TuckerFactors]) -> LayerFactors:
        """The same with every Tucker tensor changed."""
        return replace(self, groups=tuple(group.with_factors(change) for group in self.groups))


GroupStep = Callable[[GroupFactors], GroupFactors]
Step = Callable[[LayerFactors], LayerFactors]


def compress(layer: LayerFactors, steps: Iterable[Step]) -> LayerFactors:
    """Carry out the steps of a compression, one after another."""
    for step in steps:
        layer = step(layer)
    return layer


def for_each_group(step: GroupStep) -> Step:
    """A step that treats the groups of a layer one by one; its errors say in which."""

    def treat(layer: LayerFactors) -> LayerFactors:
        groups = []
        for group in layer.groups:
            with located(f"layer {layer.layer}, {group.name}"):
                groups.append(step(group))
        return replace(layer, groups=tuple(groups))

    return treat


def rounding(weights: WeightType) -> Step:
    """The step that rounds factors, and cores that are not quantised, to the stored type.

    Raises:
        NonFiniteError: A value overflows the type.
    """
    round_group = rounded_group(weights)
    return lambda layer: replace(layer, groups=tuple(map(round_group, layer.groups)))


def rounded_group(weights: WeightType) -> GroupStep:
    """The same for one group."""
    dtype = TORCH_DTYPES[weights.name]

    def rounded(factors: TuckerFactors) -> TuckerFactors:
        stored = factors.to(dtype)
        for tensor in (stored.core, *stored.factors):
            if tensor is not None:
                check_no_overflow(tensor, weights.name)
        return stored

    def treat(group: GroupFactors) -> GroupFactors:
        cores = {projection: group.factors[projection].core for projection in group.quantised}
        group = group.with_factors(rounded)
        exact = {p: replace(group.factors[p], core=core) for p, core in cores.items()}
        biases = {projection: bias.to(dtype) for projection, bias in group.biases.items()}
        for bias in biases.values():
            check_no_overflow(bias, weights.name)
        return replace(group, factors={**group.factors, **exact}, biases=biases)

    return treat

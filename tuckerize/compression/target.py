"""Targets of compression: sizes of the stacks of a group, and the pieces of work of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tuckerize.domain import DOWN, CoreType, Coupling, MultilinearRank, StackShape, coupling_name
from tuckerize.recipe import CalibrationSettings
from tuckerize.weight_types import WeightType, stored_bytes, stored_parameters


@dataclass(frozen=True, slots=True)
class CompressionTarget:
    """Sizes that the stacks of one group of experts are compressed to.

    Attributes:
        neurons: Width: neurons that an expert keeps on average.
        ranks: Core sizes of every coupling, of stacks of that width; upper bounds where a tolerance
            decides.
        tolerance: Relative residual that decides the core sizes of each stack; None if given.
        multiple: Alignment of the experts' own widths.
        equal_widths: All experts keep equally many neurons.
        cores: Encoding of the cores; None for the type of the factors.
    """

    neurons: int
    ranks: Mapping[Coupling, MultilinearRank]
    tolerance: float | None = None
    multiple: int = 1
    equal_widths: bool = False
    cores: CoreType | None = None

    @property
    def couplings(self) -> tuple[Coupling, ...]:
        """The projections that are decomposed together."""
        return tuple(self.ranks)

    def is_dense(self, shape: StackShape) -> bool:
        """Whether nothing is truncated of dense stacks of a shape."""
        return self.neurons == shape.intermediate and not any(
            rank.truncated_modes(shape) for rank in self.ranks.values()
        )

    def stored_parameters(self, shape: StackShape, coupling: Coupling) -> int:
        """Parameters stored of one coupling of dense stacks of a shape; at most, by tolerance."""
        return stored_parameters(
            shape._replace(intermediate=self.neurons), self.ranks[coupling], coupled=len(coupling)
        )

    def stored_bytes(self, shape: StackShape, coupling: Coupling, weights: WeightType) -> int:
        """The same in bytes, of factors and scales of a type.

        Of experts of different widths, whose groups of inputs may not be full, at most.
        """
        uneven = self.neurons < shape.intermediate and not self.equal_widths
        return stored_bytes(
            shape._replace(intermediate=self.neurons),
            self.ranks[coupling],
            replace(weights, cores=self.cores),
            coupled=len(coupling),
            transposed=coupling == DOWN,
            width_step=self.multiple if uneven else None,
        )


@dataclass(frozen=True, slots=True)
class LayerPiece:
    """Stacks of one layer that are compressed into one weight file.

    Attributes:
        layer: Index of the layer.
        targets: Target of every group.
        calibration: How they are calibrated; None if data-free.
        predicted_error: Relative output error (unitless) that the planner expects; None without a
            calibrated budget.
    """

    layer: int
    targets: tuple[CompressionTarget, ...]
    calibration: CalibrationSettings | None = None
    predicted_error: float | None = None

    @property
    def couplings(self) -> tuple[Coupling, ...]:
        """The projections of the piece, as they are decomposed together."""
        return self.targets[0].couplings

    @property
    def cores(self) -> CoreType | None:
        """Encoding of the cores of the layer."""
        return self.targets[0].cores

    @property
    def name(self) -> str:
        """Name of the piece for records and messages."""
        layer = f"layer-{self.layer:05d}"
        if len(self.couplings) > 1:  # all of the layer
            return layer
        return f"{layer}-{coupling_name(self.couplings[0])}"

    def stored_parameters(self, shape: StackShape) -> int:
        """Parameters stored, of dense stacks of a shape; at most, where a tolerance decides."""
        return sum(t.stored_parameters(shape, own) for t in self.targets for own in t.couplings)

    def stored_bytes(self, shape: StackShape, weights: WeightType) -> int:
        """The same in bytes of a type."""
        return sum(t.stored_bytes(shape, own, weights) for t in self.targets for own in t.couplings)

"""Budgets of calibrated layers: the sizes and encodings that they may be spent on, and the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tuckerize.calibration.layer_profile import LayerProfile
from tuckerize.compression.target import CompressionTarget
from tuckerize.domain import (
    DOWN,
    GATE_UP,
    CoreType,
    MultilinearRank,
    StackShape,
    Target,
    Truncation,
    encodings_for,
)
from tuckerize.errors import UsageError
from tuckerize.planning.allocation import Allocator, SearchSpace, check_budget, widest_within
from tuckerize.planning.budget import Budget
from tuckerize.planning.knapsack import Choice, predicted_kl
from tuckerize.recipe import CalibrationSettings, Rule
from tuckerize.weight_types import WeightType, stored_bytes

Encodings = tuple[CoreType | None, ...]
"""Encodings of cores that may be chosen; None is the type of the factors."""


@dataclass(frozen=True, slots=True)
class CalibratedModel:
    """Facts that decide the sizes of the layers of a model.

    Attributes:
        settings: Of the calibration.
        shape: Sizes (E, H, I) of one group's stack.
        groups: Groups in a layer.
        weights: Type of the stored factors.
        quantize: Encoding that the cores get in the end, whose groups sizes fit.
    """

    settings: CalibrationSettings
    shape: StackShape
    groups: int
    weights: WeightType
    quantize: CoreType | None = None

    def space(self, cores: CoreType | None) -> SearchSpace:
        """Sizes of the layers, with cores of an encoding."""
        intermediate, hidden = (
            self.settings.multiple_for(size, cores or self.quantize)
            for size in (self.shape.intermediate, self.shape.hidden)
        )
        return SearchSpace(
            self.shape,
            self.groups,
            replace(self.weights, cores=cores),
            multiples=(intermediate, hidden),
            truncation=self.settings.shape,
            equal_widths=self.settings.equal_widths,
            quantize=self.quantize,
        )

    def allocators(
        self, profiles: Sequence[LayerProfile], encodings: Encodings
    ) -> tuple[Allocator, ...]:
        """Allocators, of which the best choice counts.

        Every layer may have its own encoding, but those for any engine, whose quantisers take one.
        """
        spaces = [self.space(cores) for cores in encodings]
        alike = self.settings.target == Target.ANY_ENGINE
        parts = [[space] for space in spaces] if alike else [spaces]
        return tuple(Allocator.of(profiles, own, self.settings.allocate) for own in parts)


@dataclass(frozen=True, slots=True)
class RuleBudget:
    """The budget of a rule: of parameters, or of bits.

    Attributes:
        model: Facts that decide the sizes.
        budget: The budget; parameters count as if they were not quantised.
        encodings: Encodings that it may be spent on.
        quantize: Encoding of cores whose parameters count.
    """

    model: CalibratedModel
    budget: Budget
    encodings: Encodings
    quantize: CoreType | None

    @classmethod
    def of(cls, rule: Rule, model: CalibratedModel, quantize: CoreType | None) -> RuleBudget | None:
        """The budget of a rule with keep or bits; None of another.

        Args:
            rule: The rule.
            model: Facts that decide the sizes.
            quantize: Encoding that the recipe asks for.
        """
        if rule.keep is not None:
            aligned = replace(model, quantize=quantize)
            return cls(aligned, Budget(rule.keep), (None,), quantize)
        if rule.bits is None:
            return None
        budget = Budget.of_bits(rule.bits, dense_bits=model.weights.bits)
        choices = encodings_for(model.settings.target) if quantize is None else (quantize,)
        return cls(model, budget, choices, None)

    def check(self) -> None:
        """Refuse a budget that does not pay for the smallest sizes.

        Raises:
            UsageError: It does not; the hint names the smallest that does.
        """
        check_budget([self.model.space(cores) for cores in self.encodings], self.budget)

    def known(self) -> CompressionTarget | None:
        """The target of every layer where it takes no profile: stock experts of one encoding.

        None where layers share the budget, or an encoding is to be chosen.

        Raises:
            UsageError: The budget does not pay for the smallest sizes.
        """
        self.check()
        if self.model.settings.target != Target.ANY_ENGINE or len(self.encodings) > 1:
            return None
        target = widest_within(self.budget, self.model.space(*self.encodings))
        return target if self.quantize is None else replace(target, cores=self.quantize)

    def presumed(self) -> CompressionTarget:
        """Sizes of a layer that the budget pays for, while no profile says which are the best."""
        shape, weights = self.model.shape, self.model.weights
        dense, *encoded = (
            stored_bytes(shape, shape, replace(weights, cores=cores))
            for cores in (None, *self.encodings)
        )
        share = min(1.0, self.budget.share * dense / min(encoded))
        neurons, hidden = {
            Truncation.NEURONS: (share, 1.0),
            Truncation.LATENT: (1.0, share),
        }.get(self.model.settings.shape, (share**0.5, share**0.5))
        width = max(1, int(neurons * shape.intermediate))
        rank = MultilinearRank(shape.experts, width, max(1, int(hidden * shape.hidden)))
        if self.model.settings.shape == Truncation.FULL:
            width = shape.intermediate
        cores = self.encodings[0] if len(self.encodings) == 1 else None
        return CompressionTarget(width, {GATE_UP: rank, DOWN: rank}, cores=cores or self.quantize)

    def choose(self, profiles: Sequence[LayerProfile]) -> list[Choice]:
        """The choice of every layer.

        Args:
            profiles: Profiles of the layers.

        Raises:
            UsageError: The budget does not pay for the smallest sizes.
        """
        self.check()
        choices = best_choices(self.model.allocators(profiles, self.encodings), self.budget)
        if self.quantize is None:
            return choices
        return [self._quantised(choice) for choice in choices]

    def _quantised(self, choice: Choice) -> Choice:
        model, target = self.model, replace(choice.target, cores=self.quantize)
        stored = sum(
            target.stored_bytes(model.shape, coupling, model.weights)
            for coupling in target.couplings
        )
        return replace(choice, target=target, bytes=model.groups * stored)


def best_choices(allocators: Sequence[Allocator], budget: Budget) -> list[Choice]:
    """Choices with the smallest predicted KL divergence.

    Raises:
        UsageError: The budget does not pay for the smallest sizes of any.
    """
    found, refused = [], None
    for allocator in allocators:
        try:
            found.append(allocator.choose(budget))
        except UsageError as error:
            refused = error
    if refused is not None and not found:
        raise refused
    return min(found, key=predicted_kl)

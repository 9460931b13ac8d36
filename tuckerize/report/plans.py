"""Reports on what would be stored: plan, decompose --dry-run, recipes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tuckerize.domain import Cores, CoreType, MultilinearRank, Size, StackShape, Target


@dataclass(frozen=True, slots=True)
class PlannedBytes:
    """Bytes of a model as its published configuration and a recipe give them.

    Attributes:
        routed_bytes: Of the routed experts.
        total_bytes: Of all tensors.
        bits_per_weight: Stored bits of the routed experts over the number of routed weights.
    """

    routed_bytes: int
    total_bytes: int
    bits_per_weight: float


@dataclass(frozen=True, slots=True)
class RecipeFacts:
    """A shipped recipe and the sizes that it plans.

    Attributes:
        name: Name, as `--recipe` takes it.
        model: Hugging Face id of the model.
        also: Other releases of the same sizes.
        layers: Number of layers with routed experts.
        shape: Sizes (E, H, I) of a projection's experts in a layer.
        routed_parameters: Parameters of the routed experts.
        before: Sizes of the release.
        after: Sizes by target, the recipe's default first.
    """

    name: str
    model: str
    also: str
    layers: int
    shape: StackShape
    routed_parameters: int
    before: PlannedBytes
    after: dict[str, PlannedBytes]


@dataclass(frozen=True, slots=True)
class RecipesReport:
    """The shipped recipes of published models.

    Attributes:
        recipes: One for each model, by name.
    """

    recipes: tuple[RecipeFacts, ...]


@dataclass(frozen=True, slots=True)
class StackPlan:
    """Target of one stack.

    Attributes:
        layer: Index of the layer.
        group: Index of the group.
        projection: Projection, or `gate_up_proj` for two that share one U_I.
        multilinear_rank: Core sizes; None where a tolerance decides them.
        tolerance: That tolerance, or None.
        bytes_before: Bytes of the dense stacks.
        bytes_after: Bytes stored; at most the dense ones' where a tolerance decides.
    """

    layer: int
    group: int
    projection: str
    multilinear_rank: MultilinearRank | None
    tolerance: float | None
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, slots=True)
class Duration:
    """Estimated time of a run in one process, on this CPU as busy as it is.

    Attributes:
        least: Seconds at least.
        most: Seconds at most.
        rate: Floating-point operations per second of a float32 GEMM, measured before.
        times_products: Least and largest time of a run over that of its products at this rate.
    """

    least: float
    most: float
    rate: float
    times_products: tuple[float, float]

    @property
    def text(self) -> str:
        """The range and what it rests on, in words."""
        unit, scale = next(
            (unit, scale)
            for unit, scale, limit in (
                ("s", 1, 90),
                ("min", 60, 90),
                ("h", 3600, 48),
                ("days", 86400, math.inf),
            )
            if self.most / scale < limit
        )
        least, most = (float(f"{value / scale:.2g}") for value in (self.least, self.most))
        few, many = self.times_products
        expected = f"about {least:g} to {most:g}" if self.least >= 1 else f"at most {most:g}"
        return (
            f"{expected} {unit} ({few:g} to {many:g} times its products at "
            f"{self.rate / 1e9:.0f} GFLOP/s, measured on the CPU now)"
        )


@dataclass(frozen=True, slots=True)
class PlanReport:
    """Sizes and costs of a planned decomposition.

    Attributes:
        stacks: Every stack.
        before: Size of the source.
        after: Size of the result; an upper bound where a tolerance decides.
        peak_bytes: Estimated peak memory of one process.
        duration: Estimated time of one process, without the profile of a calibrated budget.
        predicted_kl: Predicted KL divergence from the source, nats per token; None without a
            calibrated budget.
    """

    stacks: tuple[StackPlan, ...]
    before: Size
    after: Size
    peak_bytes: int
    duration: Duration
    predicted_kl: float | None = None


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Predicted cost of one budget, spent in one way.

    Attributes:
        bits: Bits per routed weight that were asked for; about these are stored, or fewer.
        target: Engines that the result would be made for.
        encodings: Encodings that the planner could choose among: `none`, `w8`, `w4`, or `best` of
            all, by layer where the target allows it.
        cores: Encoding that it chose, or by layer.
        routed_parameters: Parameters of the routed experts that would be stored.
        routed_bytes: Bytes of them.
        total_bytes: Bytes of the whole checkpoint.
        kl: Predicted KL divergence from the source, nats per token.
        largest_error: Largest predicted relative output error of a layer.
        truncated: Whether anything is truncated; otherwise the size is quantisation alone.
    """

    bits: float
    target: Target
    encodings: str
    cores: Cores
    routed_parameters: int
    routed_bytes: int
    total_bytes: int
    kl: float
    largest_error: float
    truncated: bool


@dataclass(frozen=True, slots=True)
class CurveReport:
    """Predicted KL divergence at every budget.

    Attributes:
        model: The folder.
        before: Size of the source.
        points: The budgets, the largest first, for every target and every choice of encodings.
        notes: Remarks for the user on the calibration.
    """

    model: str
    before: Size
    points: tuple[CurvePoint, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FitChoice:
    """The largest experts of one encoding that fit onto devices.

    Attributes:
        target: Engines that the result would be made for.
        cores: Encoding; None for the type of the source.
        kept: Share of the routed parameters.
        bits: Bits per routed weight of the dense model.
        device_bytes: Bytes of the experts on the device that has the most.
        total_bytes: Bytes of the whole checkpoint.
    """

    target: Target
    cores: CoreType | None
    kept: float
    bits: float
    device_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class FitReport:
    """Sizes that fit onto devices that serve a model with tensor parallelism.

    Attributes:
        model: The folder.
        devices: Number of devices.
        device_bytes: Memory of each.
        reserved_bytes: Part of it that engines leave alone, or need for activations.
        rest_bytes: Bytes of everything but the routed experts on a device.
        cache_bytes: Bytes of the key-value cache on a device, in 16 bits.
        context: Tokens of a sequence.
        sequences: Sequences that are served at the same time.
        source_bits: Bits per routed weight of the source.
        bits: The most bits per routed weight that fit.
        choices: The largest experts of every encoding and target that fit.
        curve: Predicted cost of this size; None without a calibration text.
        notes: Remarks for the user.
    """

    model: str
    devices: int
    device_bytes: int
    reserved_bytes: int
    rest_bytes: int
    cache_bytes: int
    context: int
    sequences: int
    source_bits: float
    bits: float
    choices: tuple[FitChoice, ...]
    curve: CurveReport | None = None
    notes: tuple[str, ...] = ()

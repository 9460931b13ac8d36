"""Recipes: which stacks are decomposed, how far, and how, as schemas with their rules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from tuckerize.domain import (
    Allocation,
    CoreType,
    Dtype,
    Engine,
    Joint,
    Mtp,
    Projection,
    Target,
    Truncation,
)
from tuckerize.recipe_text import check_rank_text, is_selected, layer_ranges

_PERCENTAGE = re.compile(r"\d+(\.\d+)?%")


def _rank_text(value: object) -> object:
    """Join the YAML list [full, 50%, 1024] to the text `full,50%,1024`."""
    return ",".join(str(part) for part in value) if isinstance(value, list) else value


def _share(value: object) -> object:
    """Convert a percentage to a share: `75%` to 0.75."""
    if isinstance(value, str) and _PERCENTAGE.fullmatch(value.strip()):
        return float(value.strip()[:-1]) / 100
    return value


def _check_layers(text: str) -> str:
    layer_ranges(text)
    return text


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rule(_Schema):
    """Size of the stacks of some layers and projections.

    Attributes:
        layers: `1-3,7,20-`: single layers and ranges; all MoE layers if absent.
        projections: Projections that it applies to; all three if absent.
        rank: Core sizes `r_E,r_H,r_I`: sizes, percentages of the mode, or `full`.
        keep: Kept share of the parameters of the stacks of this rule, in (0, 1].
        bits: Bits per routed weight of the dense layers of this rule, at most; everything that is
            stored counts.
        tolerance: Relative residual that each stack of this rule may have, in (0, 1).
    """

    layers: Annotated[str, AfterValidator(_check_layers)] | None = None
    projections: tuple[Projection, ...] = tuple(Projection)
    rank: Annotated[str, BeforeValidator(_rank_text), AfterValidator(check_rank_text)] | None = None
    keep: Annotated[float, Field(gt=0, le=1), BeforeValidator(_share)] | None = None
    bits: Annotated[float, Field(gt=0, le=64)] | None = None
    tolerance: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _exactly_one_size(self) -> Rule:
        given = [self.rank, self.keep, self.bits, self.tolerance]
        if sum(value is not None for value in given) != 1:
            raise ValueError("give exactly one of rank, keep, bits and tolerance")
        if not self.projections:
            raise ValueError("projections is empty")
        if self.bits is not None and set(self.projections) != set(Projection):
            raise ValueError("bits are of whole layers: leave projections out")
        return self

    def matches(self, layer: int, projection: Projection) -> bool:
        """Whether the rule applies to a stack."""
        return projection in self.projections and (
            self.layers is None or is_selected(layer_ranges(self.layers), layer)
        )


_IMPLIED: Mapping[str, Mapping[str, object]] = {
    Target.FUSED_KERNELS: {"shape": Truncation.NARROW_LATENT, "equal_widths": True},
    Target.ANY_ENGINE: {
        "shape": Truncation.NEURONS,
        "equal_widths": True,
        "allocate": Allocation.UNIFORM,
    },
}
"""Settings that a target implies."""

# Modes of fewer groups may end in a part of one, where no other engine is to take them.
_FEW_GROUPS = 8
# The smallest groups that engines and quantisers take.
_SMALL_GROUP = 32


class CalibrationSettings(_Schema):
    """Texts and settings of a calibrated decomposition.

    Attributes:
        texts: Files (text, JSONL, JSON, parquet) or data sets, each `NAME` or `NAME:WEIGHT`; a
            recipe file may leave them to `--calibration`.
        tokens: Tokens of all texts together.
        window: Tokens per window of text.
        random_share: Share of random tokens, which belong to no domain.
        chat_template: Render conversations by the tokenizer's chat template; without it, or
            without one, the contents of the messages are joined.
        sequential: Calibrate each layer on the hidden states of the compressed layers before
            it, rather than of the dense ones.
        target: Engines that the result is made for: `any-engine` (all experts equally wide,
            no factor), `fused-kernels` (one width for a layer, and one latent size or none) or
            `free`.
        shape: Modes that may be truncated: `latent` the hidden mode, `neurons` the width of the
            experts, `narrow-latent` both, `full` all three modes of every stack; `auto` takes for
            each layer the smaller predicted error, of a width with a truncated hidden mode or of
            `full`.
        allocate: `error` shares the budget out by predicted KL divergence, `uniform` evenly.
        multiple: Truncated sizes are multiples of this; by default 128, and below 1024, 8, or 32
            for `fused-kernels`, and from 256 for `any-engine`.
        equal_widths: All experts of a layer keep equally many neurons, for kernels that need it.
        refine: Gradient steps against each layer's output, at most 25 passes over the tokens; 0
            for none.
    """

    texts: Annotated[tuple[str, ...], Field(min_length=1)]
    tokens: Annotated[int, Field(ge=1)] = 65536
    window: Annotated[int, Field(ge=2)] = 512
    random_share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    chat_template: bool = True
    sequential: bool = True
    target: Target = Target.FREE
    shape: Truncation = Truncation.AUTO
    allocate: Allocation = Allocation.ERROR
    multiple: Annotated[int, Field(ge=1)] | None = None
    equal_widths: bool = False
    refine: Annotated[int, Field(ge=0)] = 300

    @model_validator(mode="before")
    @classmethod
    def _apply_target(cls, value: Any) -> Any:  # noqa: ANN401  # as read
        target = value.get("target") if isinstance(value, Mapping) else None
        implied = _IMPLIED.get(target, {}) if isinstance(target, str) else {}
        for key, own in implied.items():
            if value.get(key, own) != own:
                raise ValueError(f"the target {target} implies {key}: {own}, not {value[key]}")
        return {**value, **implied} if implied else value

    @property
    def has_factors(self) -> bool:
        """Whether a budget may truncate modes, and not only the width of the experts."""
        return self.shape != Truncation.NEURONS

    def multiple_for(self, size: int, cores: CoreType | None = None) -> int:
        """Multiple of the truncated sizes of a mode, with cores of an encoding."""
        return self.multiple or multiple_for(self.target, size, cores)


def multiple_for(target: Target, size: int, cores: CoreType | None = None) -> int:
    """Multiple of the truncated sizes of a mode, where none is given.

    Groups of inputs that share a scale are full; except, where no other engine needs it, in
    models so small that they would be a large part of a mode. Experts for any engine are whole
    groups of 32 in 16 bits too, for the quantiser that comes after.

    Args:
        target: Where the result is served.
        size: Dense size of the mode.
        cores: Encoding of the cores; None for 16 bits.
    """
    group = (cores and cores.group_size) or 1
    many = size >= _FEW_GROUPS * _SMALL_GROUP
    grouped = target == Target.FUSED_KERNELS or (target == Target.ANY_ENGINE and many)
    small = _SMALL_GROUP if grouped else 8
    if target != Target.FREE or size >= _FEW_GROUPS * group:
        small = max(small, group)
    return 128 if size >= 1024 else small


class Recipe(_Schema):
    """Everything that determines the values that a decomposition writes.

    Attributes:
        schema_version: Version of the recipe format.
        rules: The first rule that matches a stack decides; stacks without a rule stay as they are.
        group_size: Experts per group; all experts of the layer if absent.
        joint: `gate_up`: gate_proj and up_proj share one U_I.
        dtype: Type of factors and cores (`bfloat16`, `float16`, `float32`); the source's if absent.
        quantize: Encoding of the cores: `w8`, int8 with a scale per output, `fp8`, float8_e4m3fn
            with one, `w4` or `w3`, 4 or 3 bits with a scale per group of 32 inputs, or `w4-g128` or
            `w3-g128`, of 128; if absent, the type of the factors, or what the bits of a rule are
            best spent on.
        max_sweeps: HOOI sweeps at most.
        engine: `tuckerize`, or `tensorly` for the slow reference.
        calibration: Texts to calibrate with; without them the decomposition is data-free.
        dequantize_rest: Whether what is not compressed is written dense, in `dtype`, where the
            source has it quantized; otherwise it keeps its format.
        mtp: `copy`: layers that predict further tokens stay as they are; otherwise they are
            compressed like the others, without calibration.
    """

    schema_version: Literal[1] = 1
    rules: Annotated[tuple[Rule, ...], Field(min_length=1)]
    group_size: Annotated[int, Field(ge=1)] | None = None
    joint: Joint | None = None
    dtype: Dtype | None = None
    quantize: CoreType | None = None
    max_sweeps: Annotated[int, Field(ge=0)] = 10
    engine: Engine = Engine.TUCKERIZE
    calibration: CalibrationSettings | None = None
    dequantize_rest: bool | None = None
    mtp: Mtp | None = None

    @model_validator(mode="after")
    def _fits_quantisation(self) -> Recipe:
        if self.quantize and any(rule.tolerance is not None for rule in self.rules):
            raise ValueError("a tolerance is of cores that are not quantised: give keep or rank")
        return self

    @model_validator(mode="after")
    def _fits_calibration(self) -> Recipe:
        if self.calibration is None:
            return self
        if self.engine != Engine.TUCKERIZE:
            raise ValueError(f"the engine {self.engine} is data-free: it takes no calibration")
        for rule in self.rules:
            if rule.tolerance is not None:
                raise ValueError("a tolerance is of weights, calibration is of outputs: give keep")
            if set(rule.projections) != set(Projection):
                raise ValueError("with calibration all three projections follow one rule")
        if self.calibration.target == Target.ANY_ENGINE and (
            len(self.rules) > 1
            or (self.rules[0].keep is None and self.rules[0].bits is None)
            or self.rules[0].layers is not None
        ):
            raise ValueError(
                "any-engine takes one keep or bits for all layers: experts are equally wide"
            )
        return self

    @property
    def has_budget(self) -> bool:
        """Whether a budget is shared out over the layers, which needs their profiles."""
        return any(rule.keep is not None or rule.bits is not None for rule in self.rules)

    def rule_index(self, layer: int, projection: Projection) -> int | None:
        """Index of the rule that decides about a stack."""
        for index, rule in enumerate(self.rules):
            if rule.matches(layer, projection):
                return index
        return None

"""From a checkpoint and a recipe to every piece of work, before any weight is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tuckerize.calibration.compress import CompressionTarget
from tuckerize.calibration.layer_profile import LayerProfile
from tuckerize.checkpoint.reader import TORCH_DTYPES
from tuckerize.domain import (
    GATE_UP,
    Coupling,
    Engine,
    Joint,
    MultilinearRank,
    Projection,
    StackShape,
    coupling_name,
    stored_parameters,
)
from tuckerize.errors import RecipeError, UsageError
from tuckerize.linalg.hooi import check_rank
from tuckerize.moe.families import MoeModel
from tuckerize.moe.source import SourceModel
from tuckerize.planning.allocation import Choice, allocate, check_keep
from tuckerize.planning.uniform import BudgetUnit, ranks_for_keep
from tuckerize.recipe import CalibrationSettings, Recipe, resolve_rank, select_layers
from tuckerize.version import __version__

# Half a unit in the last place: about the relative error of rounding a core and its factors.
ROUNDING = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24, "F64": 2.0**-53}


@dataclass(frozen=True, slots=True)
class Target:
    """What a group's stacks are decomposed to: core sizes, or a tolerance that decides them."""

    rank: MultilinearRank | None = None
    tolerance: float | None = None


@dataclass(frozen=True, slots=True)
class TuckerPiece:
    """One layer's stacks of the projections that share one U_I: one weight file.

    Attributes:
        layer: Index of the layer.
        coupling: The projections.
        targets: One a group.
    """

    layer: int
    coupling: Coupling
    targets: tuple[Target, ...]

    @property
    def name(self) -> str:
        """Name of the piece for records and messages."""
        return f"layer-{self.layer:05d}-{coupling_name(self.coupling)}"


@dataclass(frozen=True, slots=True)
class CopyPiece:
    """The tensors of one source file that stay as they are: one weight file, or none."""

    source_file: str
    tensors: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the piece for records and messages."""
        return f"copy-{self.source_file}"


@dataclass(frozen=True, slots=True)
class LayerPiece:
    """One calibrated layer, all projections and groups: one weight file.

    Attributes:
        layer: Index of the layer.
        sizes: What its stacks are compressed to.
        predicted_error: Relative output error (unitless) that the planner expects; None where the
            recipe gives core sizes.
    """

    layer: int
    sizes: CompressionTarget
    predicted_error: float | None = None

    @property
    def name(self) -> str:
        """Name of the piece for records and messages."""
        return f"layer-{self.layer:05d}"


Piece = TuckerPiece | LayerPiece | CopyPiece


class PlannedStacks(NamedTuple):
    """The coupled stacks of one group of a layer, and what they become.

    Attributes:
        layer: Index of the layer.
        group: Index of the group.
        coupling: The projections.
        target: What is stored.
        shape: Sizes (E, K, I) of each stack, K the mean width after neurons were selected.
    """

    layer: int
    group: int
    coupling: Coupling
    target: Target
    shape: StackShape

    @property
    def stored_parameters(self) -> int:
        """Numbers stored; where a tolerance decides, at most those of the stacks."""
        rank = self.target.rank or MultilinearRank(*self.shape)
        return stored_parameters(self.shape, rank, coupled=len(self.coupling))


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a decomposition will write.

    Attributes:
        source: The dense model.
        recipe: What was asked for.
        dtype: safetensors' name of the type of factors and cores.
        group_size: Experts in a group.
        pieces: All pieces of work, in the order of their weight files.
        text: Fingerprint of the calibration text; empty if data-free.
        predicted_damage: Nats a token that the planner expects the prediction to move by; None
            without a calibrated budget.
    """

    source: SourceModel
    recipe: Recipe
    dtype: str
    group_size: int
    pieces: tuple[Piece, ...]
    text: str = ""
    predicted_damage: float | None = None

    @property
    def group_shape(self) -> StackShape:
        """Sizes (E, H, I) of one stack."""
        return self.source.moe.shape._replace(experts=self.group_size)

    @property
    def tucker_pieces(self) -> tuple[TuckerPiece, ...]:
        """The pieces that decompose."""
        return tuple(piece for piece in self.pieces if isinstance(piece, TuckerPiece))

    @property
    def layer_pieces(self) -> tuple[LayerPiece, ...]:
        """The pieces that compress a layer for a calibration text."""
        return tuple(piece for piece in self.pieces if isinstance(piece, LayerPiece))

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers that are decomposed."""
        return tuple(sorted({p.layer for p in self.pieces if not isinstance(p, CopyPiece)}))

    @property
    def joint(self) -> Joint | None:
        """Projections that share one U_I, if any; those of calibrated budgets do."""
        if any(piece.sizes.joint for piece in self.layer_pieces):
            return Joint.GATE_UP
        return self.recipe.joint

    def weight_file(self, piece: Piece) -> str | None:
        """Name of the weight file that a piece writes, or None."""
        writing = [p for p in self.pieces if not isinstance(p, CopyPiece) or p.tensors]
        if piece not in writing:
            return None
        return f"model-{writing.index(piece) + 1:05d}-of-{len(writing):05d}.safetensors"

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one stored number of a core or factor."""
        return TORCH_DTYPES[self.dtype].itemsize

    def fingerprint(self) -> dict[str, Any]:
        """JSON values that determine every byte that is written."""
        headers = json.dumps(sorted(self.source.checkpoint.tensors.items())).encode()
        return {
            "tuckerize_version": __version__,
            "recipe": self.recipe.model_dump(mode="json"),
            "config": self.source.checkpoint.config,
            "tensors_sha256": hashlib.sha256(headers).hexdigest(),
            "text_sha256": self.text,
        }

    def stacks(self, piece: Piece) -> list[PlannedStacks]:
        """What a piece makes of its stacks; nothing for a copy."""
        if isinstance(piece, TuckerPiece):
            return [
                PlannedStacks(piece.layer, group, piece.coupling, target, self.group_shape)
                for group, target in enumerate(piece.targets)
            ]
        if isinstance(piece, LayerPiece):
            shape = self.group_shape._replace(intermediate=piece.sizes.neurons)
            return [
                PlannedStacks(
                    piece.layer, group, coupling, Target(piece.sizes.ranks[coupling[0]]), shape
                )
                for group in range(self.source.moe.shape.experts // self.group_size)
                for coupling in piece.sizes.couplings
            ]
        return []

    def stored_parameters(self, piece: Piece) -> int:
        """Numbers that a piece stores; where a tolerance decides, at most those of the stacks."""
        return sum(stacks.stored_parameters for stacks in self.stacks(piece))


def make_plan(
    source: SourceModel, recipe: Recipe, profiles: Sequence[LayerProfile] = (), text: str = ""
) -> Plan:
    """Decide every stack's multilinear rank and every weight file; reads no weights.

    Args:
        source: The dense model.
        recipe: What is asked for.
        profiles: Profiles of the layers, for the budgets of a recipe with calibration.
        text: Fingerprint of the calibration text.

    Raises:
        RecipeError: The recipe does not fit the model.
        UsageError: A group size, type or size that cannot work.
        MultilinearRankError: A core size that no stack of the model can have.
    """
    model = source.moe
    for rule in recipe.rules:
        select_layers(rule.layers, model.layers)
    group_size = _group_size(recipe, model)
    dtype = recipe.dtype.safetensors_name if recipe.dtype else model.dtype
    _check_engine(recipe)
    _check_tolerances(recipe, dtype)
    tucker: list[TuckerPiece] | list[LayerPiece]
    damage = None
    if recipe.calibration is None:
        tucker = _tucker_pieces(recipe, model, group_size)
    else:
        tucker, damage = _layer_pieces(recipe, model, group_size, profiles)
    routed = {name for layer in {p.layer for p in tucker} for name in source.routed_tensors(layer)}
    copies = [
        CopyPiece(
            file,
            tuple(
                name
                for name in content.tensors
                if name not in routed and source.checkpoint.file_of.get(name) == file
            ),
        )
        for file, content in source.checkpoint.files.items()
    ]
    return Plan(source, recipe, dtype, group_size, (*copies, *tucker), text, damage)


def _group_size(recipe: Recipe, model: MoeModel) -> int:
    experts = model.shape.experts
    size = recipe.group_size or experts
    if experts % size:
        divisors = [n for n in range(1, experts + 1) if experts % n == 0]
        raise UsageError(
            f"group size {size} does not divide the {experts} experts of a layer",
            hint=f"choose one of {', '.join(map(str, divisors))}",
        )
    return size


def _check_engine(recipe: Recipe) -> None:
    if recipe.engine == Engine.TENSORLY and (recipe.joint or recipe.max_sweeps < 1):
        what = "share one U_I between projections" if recipe.joint else "run without a sweep"
        raise UsageError(f"the engine tensorly cannot {what}", hint="use --engine tuckerize")


def _check_tolerances(recipe: Recipe, dtype: str) -> None:
    for rule in recipe.rules:
        if rule.tolerance is not None and rule.tolerance <= 2 * ROUNDING[dtype]:
            raise UsageError(
                f"tolerance {rule.tolerance:g} is not above the rounding of {dtype} "
                f"(about {2 * ROUNDING[dtype]:.1g}), in which factors are stored",
                hint="store them more precisely (--dtype float32), or allow more",
            )


def _tucker_pieces(recipe: Recipe, model: MoeModel, group_size: int) -> list[TuckerPiece]:
    groups = model.shape.experts // group_size
    shape = model.shape._replace(experts=group_size)
    places = [
        (layer, coupling, _rule_of(recipe, layer, coupling))
        for layer in model.layers
        if any(recipe.rule_index(layer, projection) is not None for projection in Projection)
        for coupling in _couplings(recipe)
    ]
    by_rule: dict[int | None, list[tuple[int, Coupling]]] = {}
    for layer, coupling, rule in places:
        by_rule.setdefault(rule, []).append((layer, coupling))
    pieces = {}
    for rule, members in by_rule.items():
        sizes = [len(coupling) for _, coupling in members for _ in range(groups)]
        targets = _targets(recipe, rule, shape, sizes)
        for index, (layer, coupling) in enumerate(members):
            own = tuple(targets[index * groups : (index + 1) * groups])
            pieces[layer, coupling] = TuckerPiece(layer, coupling, own)
    return [pieces[layer, coupling] for layer, coupling, _ in places]


def _layer_pieces(
    recipe: Recipe, model: MoeModel, group_size: int, profiles: Sequence[LayerProfile]
) -> tuple[list[LayerPiece], float | None]:
    """Pieces of all layers that a rule decides, and the damage that is predicted for budgets."""
    settings, shape = _settings(recipe), model.shape._replace(experts=group_size)
    members: dict[int, list[int]] = {}
    for layer in model.layers:
        index = recipe.rule_index(layer, Projection.GATE)
        if index is not None:
            members.setdefault(index, []).append(layer)
    pieces: list[LayerPiece] = []
    damages: list[float] = []
    for index, layers in members.items():
        rule = recipe.rules[index]
        if rule.rank is not None:
            sizes = _sizes_of_rank(recipe, rule.rank, shape)
            pieces += [LayerPiece(layer, sizes) for layer in layers]
            continue
        if not profiles:  # a draft: the budget is not shared out yet
            check_keep(
                shape,
                groups=model.shape.experts // group_size,
                keep=rule.keep or 1.0,
                multiples=_multiples(settings, shape),
                allowed=settings.shape,
            )
            dense = _sizes_of_rank(recipe, "full,full,full", shape)
            pieces += [LayerPiece(layer, dense) for layer in layers]
            continue
        own = [profile for profile in profiles if profile.layer in layers]
        choices = choose_sizes(recipe, model, group_size, own, rule.keep or 1.0)
        for layer, choice in zip(layers, choices, strict=True):
            ranks = dict.fromkeys(GATE_UP, choice.sizes.gate_up)
            ranks[Projection.DOWN] = choice.sizes.down
            sizes = CompressionTarget(
                choice.sizes.neurons,
                ranks,
                joint=True,
                multiple=_multiples(settings, shape)[0],
                equal_widths=settings.equal_widths,
            )
            pieces.append(LayerPiece(layer, sizes, choice.error**0.5))
        damages += [choice.damage for choice in choices]
    return sorted(pieces, key=lambda piece: piece.layer), sum(damages) if damages else None


def choose_sizes(
    recipe: Recipe,
    model: MoeModel,
    group_size: int,
    profiles: Sequence[LayerProfile],
    keep: float,
) -> list[Choice]:
    """Sizes of the profiled layers within a share of their parameters, as the recipe says."""
    settings, shape = _settings(recipe), model.shape._replace(experts=group_size)
    return allocate(
        profiles,
        shape,
        groups=model.shape.experts // group_size,
        keep=keep,
        multiples=_multiples(settings, shape),
        allowed=settings.shape,
        how=settings.allocate,
        equal_widths=settings.equal_widths,
    )


def _settings(recipe: Recipe) -> CalibrationSettings:
    if recipe.calibration is None:
        raise TypeError("sizes are chosen from profiles, which need calibration")
    return recipe.calibration


def _multiples(settings: CalibrationSettings, shape: StackShape) -> tuple[int, int]:
    """What truncated widths and hidden core sizes are multiples of."""
    return settings.multiple_for(shape.intermediate), settings.multiple_for(shape.hidden)


def _sizes_of_rank(recipe: Recipe, text: str, shape: StackShape) -> CompressionTarget:
    rank = resolve_rank(text, shape)
    check_rank(rank, shape)  # down stands alone, also where gate and up are joint
    return CompressionTarget(
        shape.intermediate, dict.fromkeys(Projection, rank), joint=recipe.joint is not None
    )


def _couplings(recipe: Recipe) -> list[Coupling]:
    if recipe.joint:
        return [GATE_UP, (Projection.DOWN,)]
    return [(projection,) for projection in Projection]


def _rule_of(recipe: Recipe, layer: int, coupling: Coupling) -> int | None:
    rules = {recipe.rule_index(layer, projection) for projection in coupling}
    if len(rules) > 1:
        raise RecipeError(
            f"gate_proj and up_proj of layer {layer} share one U_I but follow different rules",
            hint="give both projections the same rule, or drop joint",
        )
    return rules.pop()


def _targets(
    recipe: Recipe, rule_index: int | None, shape: StackShape, coupled: list[int]
) -> list[Target]:
    """Targets of all groups that one rule decides; without a rule all modes are full."""
    if rule_index is None:
        return [Target(rank=MultilinearRank(*shape))] * len(coupled)
    rule = recipe.rules[rule_index]
    if rule.tolerance is not None:
        return [Target(tolerance=rule.tolerance)] * len(coupled)
    if rule.rank is not None:
        rank = resolve_rank(rule.rank, shape)
        check_rank(rank, shape, coupled=min(coupled))
        return [Target(rank=rank)] * len(coupled)
    units = [BudgetUnit(shape, count) for count in coupled]
    return [Target(rank=rank) for rank in ranks_for_keep(units, rule.keep or 1.0)]

"""Plan of every piece of work, from a checkpoint and a recipe, before any weight is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tuckerize.calibration.layer_profile import LayerProfile
from tuckerize.compression.target import CompressionTarget, LayerPiece
from tuckerize.domain import (
    DOWN,
    GATE_UP,
    Cores,
    CoreType,
    Coupling,
    Engine,
    Joint,
    MultilinearRank,
    Projection,
    StackShape,
    Target,
    cores_by_layer,
)
from tuckerize.errors import RecipeError, UsageError
from tuckerize.linalg.hooi import check_rank
from tuckerize.moe.family import MoeModel
from tuckerize.moe.source import SourceModel
from tuckerize.planning.budget import Budget
from tuckerize.planning.calibrated import CalibratedModel, RuleBudget
from tuckerize.planning.knapsack import Choice, predicted_kl
from tuckerize.planning.uniform import BudgetUnit, encoding_for_budget, ranks_for_budget
from tuckerize.recipe import Recipe
from tuckerize.recipe_text import resolve_rank, select_layers
from tuckerize.version import __version__
from tuckerize.weight_types import WEIGHT_TYPES, WeightType

_FULL = "full,full,full"


@dataclass(frozen=True, slots=True)
class CopyPiece:
    """The tensors of one source file that are not compressed: one weight file, or none.

    Attributes:
        source_file: Name of the file.
        tensors: Names of the stored tensors, which stay as they are; of the dense ones, where
            `dequantize` has them written as such.
        dequantize: Whether weights are written dense that the source has quantized.
    """

    source_file: str
    tensors: tuple[str, ...]
    dequantize: bool = False

    @property
    def name(self) -> str:
        """Name of the piece for records and messages."""
        return f"copy-{self.source_file}"


Piece = LayerPiece | CopyPiece


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a decomposition will write.

    Attributes:
        source: The dense model.
        recipe: The recipe.
        weights: Type of the stored factors, and of cores that are not quantised.
        group_size: Experts in a group.
        copies: Tensors to copy, by source file.
        layer_pieces: Stacks to compress. The weight files are those of the copies, then these.
        predicted_kl: Predicted KL divergence from the source, nats per token; None without a
            calibrated budget.
        waits: Whether budgets wait for profiles; their layers have presumed sizes until then.
    """

    source: SourceModel
    recipe: Recipe
    weights: WeightType
    group_size: int
    copies: tuple[CopyPiece, ...]
    layer_pieces: tuple[LayerPiece, ...]
    predicted_kl: float | None = None
    waits: bool = False

    def without_predictions(self) -> Plan:
        """The plan without errors that no validation set will be compared with."""
        pieces = tuple(replace(piece, predicted_error=None) for piece in self.layer_pieces)
        return replace(self, layer_pieces=pieces, predicted_kl=None)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """All pieces of work, in the order of their weight files."""
        return (*self.copies, *self.layer_pieces)

    @property
    def group_shape(self) -> StackShape:
        """Sizes (E, H, I) of one stack."""
        return self.source.moe.shape._replace(experts=self.group_size)

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers that are compressed."""
        return tuple(sorted({piece.layer for piece in self.layer_pieces}))

    @property
    def cores(self) -> Cores:
        """Encodings of the cores."""
        return cores_by_layer({piece.layer: piece.cores for piece in self.layer_pieces})

    @property
    def joint(self) -> Joint | None:
        """Projections that share one U_I, if any; those of calibrated budgets do."""
        shared = any(GATE_UP in piece.couplings for piece in self.layer_pieces)
        return Joint.GATE_UP if shared else self.recipe.joint

    def weight_file(self, piece: Piece) -> str | None:
        """Name of the weight file that a piece writes; None of a copy of nothing."""
        writing = [*(copy for copy in self.copies if copy.tensors), *self.layer_pieces]
        if piece not in writing:
            return None
        return f"model-{writing.index(piece) + 1:05d}-of-{len(writing):05d}.safetensors"


def output_fingerprint(source: SourceModel, recipe: Recipe, text: str = "") -> dict[str, Any]:
    """JSON values that determine every byte that a decomposition writes.

    Args:
        source: The dense model.
        recipe: The recipe.
        text: Fingerprint of the calibration set; empty if data-free.
    """
    headers = json.dumps(sorted(source.checkpoint.tensors.items())).encode()
    return {
        "tuckerize_version": __version__,
        "recipe": recipe.model_dump(mode="json"),
        "config": source.checkpoint.config,
        "tensors_sha256": hashlib.sha256(headers).hexdigest(),
        "weights": source.identities,
        "text_sha256": text,
    }


def make_plan(source: SourceModel, recipe: Recipe, profiles: Sequence[LayerProfile] = ()) -> Plan:
    """Decide every stack's multilinear rank and every weight file; reads no weights.

    Args:
        source: The dense model.
        recipe: The recipe.
        profiles: Profiles of the layers, for calibrated budgets. Without them a budget is checked,
            and its layers have sizes that it pays for where these depend on profiles.

    Raises:
        RecipeError: The recipe does not fit the model.
        UsageError: A group size, type or size that cannot work; or experts without a gate_proj.
        MultilinearRankError: A core size that no stack of the model can have.
    """
    source.require_gates()
    model = source.moe
    further = _further_layers(recipe, model)
    for rule in recipe.rules:
        select_layers(rule.layers, model.layers + further)
    group_size = _group_size(recipe, model)
    weights = stored_type(recipe, model)
    _check_engine(recipe)
    _check_tolerances(recipe, weights)
    groups = model.shape.experts // group_size
    shape = model.shape._replace(experts=group_size)
    predicted_kl, waits = None, False
    if recipe.calibration is None:
        pieces = _data_free_pieces(recipe, model.layers + further, shape, groups, weights)
    else:
        sizes = CalibratedModel(recipe.calibration, shape, groups, weights)
        pieces, predicted_kl, waits = _calibrated_pieces(recipe, model.layers, sizes, profiles)
        shared = any(GATE_UP in piece.couplings for piece in pieces)
        alike = recipe.model_copy(update={"joint": Joint.GATE_UP if shared else recipe.joint})
        pieces += _data_free_pieces(alike, further, shape, groups, weights)
    copies = _copies(source, {piece.layer for piece in pieces}, dequantize=recipe.dequantize_rest)
    return Plan(source, recipe, weights, group_size, copies, tuple(pieces), predicted_kl, waits)


def _further_layers(recipe: Recipe, model: MoeModel) -> tuple[int, ...]:
    """Layers that predict further tokens and are compressed, without calibration.

    They read what no pass over the model computes, and an error of theirs changes no token: drafts
    are checked. A stock checkpoint has no factors, and keeps theirs as they are.
    """
    stock = recipe.calibration and recipe.calibration.target == Target.ANY_ENGINE
    return () if recipe.mtp or stock else model.further


def _copies(
    source: SourceModel, layers: set[int], *, dequantize: bool | None
) -> tuple[CopyPiece, ...]:
    """Tensors that are not compressed, file by file."""
    checkpoint = source.checkpoint
    if dequantize:
        routed = {name for layer in layers for name in source.routed_tensors(layer)}
        names = {file: checkpoint.names_in(file) for file in checkpoint.files}
    else:
        source.rest(layers)  # refused here if config.json cannot be true
        routed = {name for layer in layers for name in source.stored_tensors(layer)}
        names = {
            file: [name for name in content.tensors if checkpoint.file_of.get(name) == file]
            for file, content in checkpoint.files.items()
        }
    return tuple(
        CopyPiece(file, tuple(n for n in own if n not in routed), dequantize=bool(dequantize))
        for file, own in names.items()
    )


def stored_type(recipe: Recipe, model: MoeModel) -> WeightType:
    """Type of the stored cores and factors: the recipe's, or that of the source."""
    return WEIGHT_TYPES[recipe.dtype.safetensors_name if recipe.dtype else model.dtype]


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


def _check_tolerances(recipe: Recipe, weights: WeightType) -> None:
    for rule in recipe.rules:
        if rule.tolerance is not None and rule.tolerance <= 2 * weights.rounding:
            raise UsageError(
                f"tolerance {rule.tolerance:g} is not above the rounding of {weights.name} "
                f"(about {2 * weights.rounding:.1g}), in which factors are stored",
                hint="store them more precisely (--dtype float32), or allow more",
            )


def _data_free_pieces(
    recipe: Recipe, layers: Sequence[int], shape: StackShape, groups: int, weights: WeightType
) -> list[LayerPiece]:
    """One piece per layer and coupling, of all layers that a rule decides."""
    places = [
        (layer, coupling, _rule_of(recipe, layer, coupling))
        for layer in layers
        if any(recipe.rule_index(layer, projection) is not None for projection in Projection)
        for coupling in _couplings(recipe)
    ]
    by_rule: dict[int | None, list[tuple[int, Coupling]]] = {}
    for layer, coupling, rule in places:
        by_rule.setdefault(rule, []).append((layer, coupling))
    pieces = {}
    for index, members in by_rule.items():
        couplings = [coupling for _, coupling in members for _ in range(groups)]
        targets = _targets(recipe, index, shape, couplings, weights)
        for number, (layer, coupling) in enumerate(members):
            own = tuple(targets[number * groups : (number + 1) * groups])
            pieces[layer, coupling] = LayerPiece(layer, own)
    return [pieces[layer, coupling] for layer, coupling, _ in places]


def _targets(
    recipe: Recipe,
    rule_index: int | None,
    shape: StackShape,
    couplings: list[Coupling],
    weights: WeightType,
) -> list[CompressionTarget]:
    """Targets of all groups that one rule decides; without a rule all modes are full."""
    ranks, tolerance = [MultilinearRank(*shape)] * len(couplings), None
    cores = recipe.quantize
    if rule_index is not None:
        rule = recipe.rules[rule_index]
        if rule.rank is not None:
            rank = resolve_rank(rule.rank, shape)
            check_rank(rank, shape, coupled=min(len(coupling) for coupling in couplings))
            ranks = [rank] * len(couplings)
        elif rule.keep is not None:  # of parameters
            ranks = ranks_for_budget(_units(shape, couplings, weights), Budget(rule.keep))
        elif rule.bits is not None:
            budget = Budget.of_bits(rule.bits, dense_bits=weights.bits)

            def units(own: CoreType | None) -> list[BudgetUnit]:
                return _units(shape, couplings, replace(weights, cores=own))

            cores = cores or encoding_for_budget(units, budget)
            ranks = ranks_for_budget(units(cores), budget)
        tolerance = rule.tolerance
    return [
        CompressionTarget(shape.intermediate, {coupling: rank}, tolerance, cores=cores)
        for coupling, rank in zip(couplings, ranks, strict=True)
    ]


def _units(
    shape: StackShape, couplings: Sequence[Coupling], weights: WeightType
) -> list[BudgetUnit]:
    return [
        BudgetUnit(shape, len(coupling), weights, transposed=coupling == DOWN)
        for coupling in couplings
    ]


def _calibrated_pieces(
    recipe: Recipe,
    layers: Sequence[int],
    sizes: CalibratedModel,
    profiles: Sequence[LayerProfile],
) -> tuple[list[LayerPiece], float | None, bool]:
    """One piece per layer that a rule decides; see `Plan` for the rest."""
    members: dict[int, list[int]] = {}
    for layer in layers:
        index = recipe.rule_index(layer, Projection.GATE)
        if index is not None:
            members.setdefault(index, []).append(layer)
    pieces: list[LayerPiece] = []
    chosen: list[Choice] = []
    waits = False

    def add(layer: int, target: CompressionTarget, predicted_error: float | None = None) -> None:
        pieces.append(LayerPiece(layer, (target,) * sizes.groups, sizes.settings, predicted_error))

    for index, own in members.items():
        rule = recipe.rules[index]
        budget = RuleBudget.of(rule, sizes, recipe.quantize)
        if budget is None or not profiles:
            if budget is None:
                target = _target_of_rank(recipe, rule.rank or _FULL, sizes.shape)
            else:
                known = budget.known()
                waits |= known is None
                target = known or budget.presumed()
            for layer in own:
                add(layer, target)
            continue
        choices = budget.choose([profile for profile in profiles if profile.layer in own])
        for layer, choice in zip(own, choices, strict=True):
            add(layer, choice.target, choice.error**0.5)
        chosen += choices
    pieces.sort(key=lambda piece: piece.layer)
    return pieces, predicted_kl(chosen) if chosen else None, waits


def _target_of_rank(recipe: Recipe, text: str, shape: StackShape) -> CompressionTarget:
    rank = resolve_rank(text, shape)
    check_rank(rank, shape)  # down stands alone, also where gate and up are joint
    ranks = dict.fromkeys(_couplings(recipe), rank)
    return CompressionTarget(shape.intermediate, ranks, cores=recipe.quantize)


def _couplings(recipe: Recipe) -> list[Coupling]:
    if recipe.joint:
        return [GATE_UP, DOWN]
    return [(projection,) for projection in Projection]


def _rule_of(recipe: Recipe, layer: int, coupling: Coupling) -> int | None:
    rules = {recipe.rule_index(layer, projection) for projection in coupling}
    if len(rules) > 1:
        raise RecipeError(
            f"gate_proj and up_proj of layer {layer} share one U_I but follow different rules",
            hint="give both projections the same rule, or drop joint",
        )
    return rules.pop()

"""From a checkpoint and a recipe to every piece of work, before any weight is read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import tuckerize
from tuckerize.checkpoint.reader import TORCH_DTYPES, Checkpoint
from tuckerize.domain import (
    GATE_UP,
    Coupling,
    MultilinearRank,
    Projection,
    StackShape,
    coupling_name,
    stored_parameters,
)
from tuckerize.errors import RecipeError, UsageError
from tuckerize.linalg.hooi import check_rank
from tuckerize.moe.families import MoeModel, describe_moe
from tuckerize.pipeline.budget import BudgetUnit, ranks_for_keep
from tuckerize.recipe import Recipe, resolve_rank, select_layers

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""safetensors' names of the types that factors can be stored in."""

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


Piece = TuckerPiece | CopyPiece


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a decomposition will write.

    Attributes:
        source: The checkpoint.
        model: Its MoE facts.
        recipe: What was asked for.
        dtype: safetensors' name of the type of factors and cores.
        group_size: Experts in a group.
        pieces: All pieces of work, in the order of their weight files.
    """

    source: Checkpoint
    model: MoeModel
    recipe: Recipe
    dtype: str
    group_size: int
    pieces: tuple[Piece, ...]

    @property
    def group_shape(self) -> StackShape:
        """Sizes (E, H, I) of one stack."""
        return self.model.shape._replace(experts=self.group_size)

    @property
    def tucker_pieces(self) -> tuple[TuckerPiece, ...]:
        """The pieces that decompose."""
        return tuple(piece for piece in self.pieces if isinstance(piece, TuckerPiece))

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers that are decomposed."""
        return tuple(sorted({piece.layer for piece in self.tucker_pieces}))

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
        headers = json.dumps(sorted(self.source.tensors.items())).encode()
        return {
            "tuckerize_version": tuckerize.__version__,
            "recipe": self.recipe.model_dump(mode="json"),
            "config": self.source.config,
            "tensors_sha256": hashlib.sha256(headers).hexdigest(),
        }

    def stored_parameters(self, piece: TuckerPiece) -> int:
        """Numbers that a piece stores; where a tolerance decides, at most those of the stack."""
        dense = MultilinearRank(*self.group_shape)
        return sum(
            stored_parameters(self.group_shape, target.rank or dense, coupled=len(piece.coupling))
            for target in piece.targets
        )


def make_plan(source: Checkpoint, recipe: Recipe) -> Plan:
    """Decide every stack's multilinear rank and every weight file; reads no weights.

    Raises:
        CheckpointError: The family is not supported or routed weights are incomplete.
        RecipeError: The recipe does not fit the model.
        UsageError: A group size, type or size that cannot work.
        MultilinearRankError: A core size that no stack of the model can have.
    """
    model = describe_moe(source.config, source.tensors)
    for rule in recipe.rules:
        select_layers(rule.layers, model.layers)
    group_size = _group_size(recipe, model)
    dtype = DTYPES[recipe.dtype] if recipe.dtype else model.dtype
    _check_engine(recipe)
    _check_tolerances(recipe, dtype)
    tucker = _tucker_pieces(recipe, model, group_size)
    routed = {
        name for layer in {p.layer for p in tucker} for name in model.layer_weight_names(layer)
    }
    copies = [
        CopyPiece(
            file,
            tuple(
                name
                for name in content.tensors
                if name not in routed and source.file_of.get(name) == file
            ),
        )
        for file, content in source.files.items()
    ]
    return Plan(source, model, recipe, dtype, group_size, (*copies, *tucker))


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
    if recipe.engine == "tensorly" and (recipe.joint or recipe.max_sweeps < 1):
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

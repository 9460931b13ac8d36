"""`quantization_config` in config.json of a Tucker checkpoint, see docs/reference/format.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from tuckerize.domain import (
    GATE_UP,
    CoreType,
    Joint,
    MultilinearRank,
    Projection,
    StackShape,
    cores_of,
)
from tuckerize.format.cores import core_tensor_shapes, core_types_of, scheme_of
from tuckerize.format.manifest import TuckerManifest
from tuckerize.moe.family import Family
from tuckerize.names import TensorName

METHOD = "tuckerize"
"""`quant_method`: the name under which transformers and vLLM look up the loader."""

FORMAT_VERSION = 2
QUANTISED_FORMAT_VERSION = 3
"""Format version of a checkpoint with quantised cores or biases."""

_KEY = "quantization_config"


@dataclass(frozen=True, slots=True)
class GroupShape:
    """Sizes of one group of factored experts.

    Attributes:
        widths: Neurons of every expert.
        ranks: Core sizes of every projection.
        joint: Whether gate and up share one U_I.
        core_type: Encoding of the cores; None if they are of the same type as the factors.
        biased: Whether the projections have biases.
    """

    widths: tuple[int, ...]
    ranks: Mapping[Projection, MultilinearRank]
    joint: bool
    core_type: CoreType | None = None
    biased: bool = False

    @property
    def experts(self) -> int:
        """Experts of the group."""
        return len(self.widths)

    @property
    def equal_widths(self) -> bool:
        """Whether all experts have equally many neurons, and so one core."""
        return len(set(self.widths)) == 1

    def stack_shape(self, hidden: int) -> StackShape:
        """Sizes of one stack; H is the mean width.

        Args:
            hidden: Hidden size I of the model.
        """
        return StackShape(self.experts, sum(self.widths) // self.experts, hidden)

    def core_shapes(self) -> dict[TensorName, tuple[int, ...]]:
        """Shapes of the cores, or of the experts' matrices, by their names in the group."""
        shapes: dict[TensorName, tuple[int, ...]] = {}
        for projection, rank in self.ranks.items():
            if self.equal_widths:
                shapes[TensorName.core(projection)] = tuple(rank)
            else:
                for expert, width in enumerate(self.widths):
                    shapes[TensorName.core(projection, expert)] = (width, rank.hidden)
        return shapes

    def tensor_shapes(self, hidden: int) -> dict[TensorName, tuple[int, ...]]:
        """Shapes of the stored tensors by their names relative to the group.

        Args:
            hidden: Hidden size I of the model.
        """
        stack = self.stack_shape(hidden)
        shapes: dict[TensorName, tuple[int, ...]] = {}
        cores = self.core_shapes()
        for projection, rank in self.ranks.items():
            for core, shape in cores.items():
                if core.projection == projection:
                    shapes |= core_tensor_shapes(core, self.core_type, shape)
            if self.biased:
                shapes |= self._bias_shapes(projection, hidden)
            coupling = GATE_UP if self.joint and projection in GATE_UP else None
            for mode in rank.truncated_modes(stack):
                shapes[TensorName.factor(mode, projection, coupling)] = (stack[mode], rank[mode])
        return shapes

    def _bias_shapes(
        self, projection: Projection, hidden: int
    ) -> dict[TensorName, tuple[int, ...]]:
        """Shapes of the biases of a projection; of down they have the hidden size."""
        if projection == Projection.DOWN:
            return {TensorName.bias(projection): (self.experts, hidden)}
        if self.equal_widths:
            return {TensorName.bias(projection): (self.experts, self.widths[0])}
        return {TensorName.bias(projection, e): (width,) for e, width in enumerate(self.widths)}


@dataclass(frozen=True, slots=True)
class TuckerQuantization:
    """The factored experts of a Tucker checkpoint, as config.json describes them to engines.

    Attributes:
        group_size: Experts in a group.
        joint: Projections that share one U_I, if any.
        modules: Groups of every factored experts module, by the module's name in the checkpoint.
        rest: `quantization_config` of everything else, where the source was quantized.
        biased: Whether the projections have biases.
    """

    group_size: int
    joint: Joint | None
    modules: Mapping[str, tuple[GroupShape, ...]]
    rest: Mapping[str, Any] | None = None
    biased: bool = False

    @classmethod
    def of(
        cls, manifest: TuckerManifest, family: Family, rest: Mapping[str, Any] | None = None
    ) -> TuckerQuantization:
        """Describe the checkpoint of a manifest.

        Args:
            manifest: The manifest.
            family: The model's family.
            rest: `quantization_config` of everything but the factored experts.
        """
        joint, biased = manifest.joint is not None, family.storage.biased
        modules = {
            family.experts_prefix(layer): tuple(
                GroupShape(
                    manifest.widths(layer, group),
                    ranks,
                    joint,
                    cores_of(manifest.cores, layer),
                    biased,
                )
                for group, ranks in enumerate(manifest.ranks(layer))
            )
            for layer in manifest.layers
        }
        return cls(manifest.group_size, manifest.joint, modules, rest, biased)

    @property
    def core_types(self) -> dict[str, CoreType]:
        """Encodings of the modules whose cores are quantised."""
        found = {module: groups[0].core_type for module, groups in self.modules.items()}
        return {module: core_type for module, core_type in found.items() if core_type is not None}

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> TuckerQuantization:
        """Parse `quantization_config`.

        Args:
            value: Its contents.

        Raises:
            ValueError: It has the format version of another release, or a key is missing or
                invalid; the message names it.
        """
        version = value.get("format_version")
        if version not in (FORMAT_VERSION, QUANTISED_FORMAT_VERSION):
            raise ValueError(
                f"the checkpoint has format_version {version!r}, this tuckerize reads "
                f"{FORMAT_VERSION} and {QUANTISED_FORMAT_VERSION}: use the release that wrote it"
            )
        try:
            found = _Contents.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise _invalid(first["loc"], first["msg"]) from None
        core_types = found.core_types
        modules = {
            module: tuple(
                found.group_shape(group, (module, index), core_types.get(module))
                for index, group in enumerate(groups)
            )
            for module, groups in found.modules.items()
        }
        return cls(found.group_size, found.joint, modules, found.rest, found.biases)

    def to_json(self) -> dict[str, Any]:
        """Contents of `quantization_config`."""
        core_types = self.core_types
        later = core_types or self.biased
        return {
            "quant_method": METHOD,
            "format_version": QUANTISED_FORMAT_VERSION if later else FORMAT_VERSION,
            "group_size": self.group_size,
            "joint": self.joint,
            **({"cores": scheme_of(core_types, self.modules)} if core_types else {}),
            **({"biases": True} if self.biased else {}),
            "modules": {
                module: [
                    {
                        "neurons": group.widths[0] if group.equal_widths else list(group.widths),
                        **{str(projection): list(rank) for projection, rank in group.ranks.items()},
                    }
                    for group in groups
                ]
                for module, groups in self.modules.items()
            },
            **({"rest": dict(self.rest)} if self.rest else {}),
        }


def find_quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """`quantization_config` of a Tucker checkpoint, unparsed; None in any other config.json."""
    value = config.get(_KEY)
    if isinstance(value, Mapping) and value.get("quant_method") == METHOD:
        return value
    return None


def with_quantization(
    config: Mapping[str, Any], quantization: TuckerQuantization
) -> dict[str, Any]:
    """A config.json that describes factored experts."""
    return {**config, _KEY: quantization.to_json()}


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without the description of factored experts: that of a dense model."""
    return {key: value for key, value in config.items() if key != _KEY}


_Size = Annotated[int, Field(ge=1, strict=True)]
_Widths = Annotated[
    tuple[_Size, ...], BeforeValidator(lambda value: (value,) if isinstance(value, int) else value)
]


class _Group(BaseModel):
    """One group on disk; `neurons` is one number where all experts are equally wide."""

    neurons: _Widths
    gate_proj: tuple[_Size, _Size, _Size]
    up_proj: tuple[_Size, _Size, _Size]
    down_proj: tuple[_Size, _Size, _Size]


class _Contents(BaseModel):
    """The whole on disk; unknown keys are ignored."""

    group_size: _Size
    joint: Joint | None
    cores: dict[str, Any] | None = None
    biases: bool = False
    modules: dict[str, Annotated[tuple[_Group, ...], Field(min_length=1)]]
    rest: dict[str, Any] | None = None

    @property
    def core_types(self) -> dict[str, CoreType]:
        """Encodings of the modules whose cores are quantised, checked to be ones that are known."""
        if self.cores is None:
            return {}
        try:
            return core_types_of(self.cores, self.modules)
        except ValueError as error:
            raise _invalid(("cores",), str(error)) from None

    def group_shape(
        self, group: _Group, place: tuple[str, int], core_type: CoreType | None
    ) -> GroupShape:
        """One group, checked against the number of its experts."""
        widths = group.neurons * (self.group_size if len(group.neurons) == 1 else 1)
        if len(widths) != self.group_size:
            raise _invalid(
                ("modules", *place, "neurons"),
                f"{len(widths)} widths are not those of {self.group_size} experts",
            )
        ranks = (group.gate_proj, group.up_proj, group.down_proj)
        named = {p: MultilinearRank(*rank) for p, rank in zip(Projection, ranks, strict=True)}
        return GroupShape(widths, named, self.joint is not None, core_type, self.biases)


def _invalid(place: Sequence[str | int], message: str) -> ValueError:
    return ValueError(f"{'.'.join(map(str, (_KEY, *place)))}: {message}")

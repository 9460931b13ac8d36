"""Names of the tensors of factored experts, in checkpoints and in modules.

A layer's factors are stored below the module of its routed experts, `model.layers.3.mlp.experts`:

    <experts>.group_0.gate_proj.core      core of all experts of the group
    <experts>.group_0.down_proj.core.5    core rows of expert 5 of the group, where widths differ
    <experts>.group_0.down_proj.U_H       factor of a truncated mode
    <experts>.group_0.down_proj.bias      bias of all experts, where they have one; also bias.5
    <experts>.group_0.gate_up_proj.U_I    U_I shared by gate_proj and up_proj
    <experts>.group_0.up_proj.core.weight_packed    codes of a quantised core; also core.5.weight_…

No other module parses or formats such names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from tuckerize.domain import SHARED_U_I, Coupling, Mode, Projection, coupling_name


class TensorKind(StrEnum):
    """Role of a tensor in its stack: core, factor of a mode, or bias of the outputs."""

    CORE = "core"
    U_E = "U_E"
    U_H = "U_H"
    U_I = "U_I"
    BIAS = "bias"


class CorePart(StrEnum):
    """Tensor of a quantised core, by its name in compressed-tensors.

    Its last two dimensions are outputs and inputs: r_I x H of down_proj, H x r_I of the others.
    """

    CODES = "weight"
    PACKED_CODES = "weight_packed"
    SCALES = "weight_scale"


GROUP_PATTERN = r"group_(?P<group>0|[1-9][0-9]*)"
"""Regular expression of the module of a group."""

_IN_GROUP = re.compile(rf"(?:^|\.){GROUP_PATTERN}\.")
_OWNERS = "|".join((*Projection, SHARED_U_I))
_KINDS = "|".join(TensorKind)
_PARTS = "|".join(CorePart)
_INDICES = ("expert", "group")
_NAME = re.compile(
    rf"(?:(?:(?P<experts>.+)\.)?{GROUP_PATTERN}\.)?"
    rf"(?P<owner>{_OWNERS})\.(?P<kind>{_KINDS})(?:\.(?P<expert>0|[1-9][0-9]*))?(?:\.(?P<part>{_PARTS}))?",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class TensorName:
    """Name of one tensor of a factored layer; `str` formats it, `parse` is the inverse.

    Attributes:
        owner: The projection, or `gate_up_proj` for a U_I shared by gate and up.
        kind: Core, factor or bias.
        expert: Index in the group of the expert whose rows these are, of the core or of the bias;
            None for all experts.
        group: Index of the group in the layer; None in names relative to the group.
        experts: Module of the layer's routed experts; None in names relative to the layer.
        part: Codes or scales, of a quantised core.

    Raises:
        ValueError: No tensor has such a name: rows or codes of a factor, a shared core, or experts
            without a group.

    >>> TensorName.parse("model.layers.3.mlp.experts.group_0.down_proj.core.5").expert
    5
    >>> str(TensorName.core(Projection.UP).within(1))
    'group_1.up_proj.core'
    """

    owner: str
    kind: TensorKind
    expert: int | None = None
    group: int | None = None
    experts: str | None = None
    part: CorePart | None = None

    def __post_init__(self) -> None:
        if (
            (self.expert is not None and self.kind not in (TensorKind.CORE, TensorKind.BIAS))
            or (self.part is not None and self.kind != TensorKind.CORE)
            or (self.owner == SHARED_U_I and self.kind != TensorKind.U_I)
            or (self.experts is not None and self.group is None)
        ):
            raise ValueError(f"'{self}' is not the name of a tensor of factored experts")

    @classmethod
    def core(cls, projection: Projection, expert: int | None = None) -> TensorName:
        """Core of a projection, or the rows of one expert; relative to the group."""
        return cls(projection, TensorKind.CORE, expert)

    @classmethod
    def bias(cls, projection: Projection, expert: int | None = None) -> TensorName:
        """Bias of a projection, or of one expert; relative to the group."""
        return cls(projection, TensorKind.BIAS, expert)

    @classmethod
    def factor(
        cls, mode: Mode, projection: Projection, coupling: Coupling | None = None
    ) -> TensorName:
        """Factor of a mode of a projection, relative to the group.

        Args:
            mode: The mode.
            projection: The projection.
            coupling: Projections that share one U_I with it; None if it has its own.
        """
        owner = coupling_name(coupling) if coupling and mode == Mode.HIDDEN else projection
        return cls(owner, TensorKind(mode.factor_name))

    @classmethod
    def parse(cls, text: str) -> TensorName:
        """Parse a name relative to the group (`gate_proj.core`), the layer or the checkpoint.

        Raises:
            ValueError: It is not the name of a tensor of factored experts.
        """
        match = _NAME.fullmatch(text)
        if match is None:
            raise ValueError(f"'{text}' is not the name of a tensor of factored experts")
        expert, group = (None if (n := match[key]) is None else int(n) for key in _INDICES)
        part = CorePart(match["part"]) if match["part"] else None
        return cls(match["owner"], TensorKind(match["kind"]), expert, group, match["experts"], part)

    @classmethod
    def find(cls, text: str) -> TensorName | None:
        """Parse a name; None if it is that of any other tensor."""
        try:
            return cls.parse(text)
        except ValueError:
            return None

    @property
    def projection(self) -> Projection:
        """The projection it belongs to; gate_proj for a U_I shared by gate and up."""
        return Projection.GATE if self.owner == SHARED_U_I else Projection(self.owner)

    @property
    def within_owner(self) -> str:
        """Name relative to the projection: `core`, `core.5`, `core.5.weight_scale`, `U_I`."""
        words = (self.kind, self.expert, self.part)
        return ".".join(str(word) for word in words if word is not None)

    @property
    def within_group(self) -> TensorName:
        """The same tensor, named relative to its group."""
        return replace(self, group=None, experts=None)

    @property
    def core_name(self) -> TensorName:
        """The core that it is a part of, or itself."""
        return replace(self, part=None)

    def within(self, group: int, experts: str | None = None) -> TensorName:
        """The same tensor, named relative to the layer, or to the checkpoint.

        Args:
            group: Index of the group in the layer.
            experts: Module of the layer's routed experts.
        """
        return replace(self, group=group, experts=experts)

    @property
    def module(self) -> str:
        """Module of its group; empty in a name relative to the group."""
        return "" if self.group is None else group_module(self.group, self.experts)

    def __str__(self) -> str:
        below = f"{self.owner}.{self.within_owner}"
        return f"{self.module}.{below}" if self.module else below


def group_module(group: int, experts: str | None = None) -> str:
    """Module of a group.

    Args:
        group: Index of the group in the layer.
        experts: Module of the layer's routed experts; None for a name relative to it.
    """
    return f"group_{group}" if experts is None else f"{experts}.group_{group}"


def in_group(text: str) -> bool:
    """Whether a name lies in the module of a group of factored experts."""
    return _IN_GROUP.search(text) is not None


def expert_rows(
    names: Iterable[TensorName], kind: TensorKind = TensorKind.CORE
) -> list[TensorName]:
    """Names of the experts' core rows of one projection, in the order of the experts.

    Args:
        names: Names of the projection's tensors.
        kind: The same of biases.

    Returns:
        One for each expert; none where the tensor is stored as a whole.
    """
    own = (name for name in names if name.kind == kind)
    found = {name.expert: name for name in own if name.expert is not None}
    return [found[expert] for expert in sorted(found)]

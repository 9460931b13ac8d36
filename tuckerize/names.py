"""Names of the tensors of factored experts, in checkpoints and in modules.

A factored layer lies in the place of its dense experts, `model.layers.3.mlp.experts`, say:

    <experts>.group_0.gate_proj.core      core of a stack, all experts of the group
    <experts>.group_0.down_proj.core.5    rows of the core of expert 5, where widths differ
    <experts>.group_0.down_proj.U_H       factor of a truncated mode
    <experts>.group_0.gate_up_proj.U_I    U_I that gate_proj and up_proj share

This is the only module that takes such names apart or puts them together.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import StrEnum

from tuckerize.domain import SHARED_U_I, Coupling, Mode, Projection, coupling_name


class TensorKind(StrEnum):
    """What a tensor of a stack is: its core, or the factor of a mode."""

    CORE = "core"
    U_E = "U_E"
    U_H = "U_H"
    U_I = "U_I"

    @classmethod
    def factor(cls, mode: Mode) -> TensorKind:
        """The factor of a mode."""
        return cls(mode.factor_name)


_OWNERS = "|".join((*Projection, SHARED_U_I))
_NAME = re.compile(
    rf"(?:(?:(?P<experts>.+)\.)?group_(?P<group>\d+)\.)?"
    rf"(?P<owner>{_OWNERS})\.(?P<kind>core|U_E|U_H|U_I)(?:\.(?P<expert>\d+))?"
)


@dataclass(frozen=True, slots=True)
class TensorName:
    """Name of one stored tensor of a factored layer; `str` formats it.

    Attributes:
        owner: A projection, or `gate_up_proj` for a U_I that gate and up share.
        kind: Core, or a factor.
        expert: Place in the group of the expert whose core rows these are; None of all experts'.
        group: Index of the group in the layer; None in a name below the group.
        experts: Module of the layer's routed experts; None in a name below it.

    >>> TensorName.parse("model.layers.3.mlp.experts.group_0.down_proj.core.5").expert
    5
    >>> str(TensorName("gate_up_proj", TensorKind.U_I, group=1))
    'group_1.gate_up_proj.U_I'
    """

    owner: str
    kind: TensorKind
    expert: int | None = None
    group: int | None = None
    experts: str | None = None

    @classmethod
    def parse(cls, text: str) -> TensorName:
        """Take a name apart, below the group (`gate_proj.core`), the layer, or the checkpoint.

        Raises:
            ValueError: It is not the name of a tensor of factored experts.
        """
        match = _NAME.fullmatch(text)
        if match is None or (match["expert"] and match["kind"] != TensorKind.CORE):
            raise ValueError(f"{text!r} is not the name of a tensor of factored experts")
        expert, group = (
            None if match[key] is None else int(match[key]) for key in ("expert", "group")
        )
        return cls(match["owner"], TensorKind(match["kind"]), expert, group, match["experts"])

    @classmethod
    def find(cls, text: str) -> TensorName | None:
        """The same, or None for the name of any other tensor."""
        try:
            return cls.parse(text)
        except ValueError:
            return None

    @property
    def projection(self) -> Projection:
        """The projection it belongs to; gate_proj for a U_I that gate and up share."""
        return Projection.GATE if self.owner == SHARED_U_I else Projection(self.owner)

    @property
    def below_owner(self) -> str:
        """Name below the projection: `core`, `core.5`, `U_I`."""
        return self.kind if self.expert is None else f"{self.kind}.{self.expert}"

    @property
    def below_group(self) -> str:
        """Name below the group: `gate_proj.core`."""
        return f"{self.owner}.{self.below_owner}"

    def within(self, group: int, experts: str | None = None) -> TensorName:
        """The same tensor, named from the layer or from the checkpoint."""
        return replace(self, group=group, experts=experts)

    def __str__(self) -> str:
        parts = [] if self.experts is None else [self.experts]
        parts += [] if self.group is None else [f"group_{self.group}"]
        return ".".join([*parts, self.below_group])


def owner_of(kind: TensorKind, projection: Projection, coupling: Coupling) -> str:
    """Owner of a tensor of a stack: the coupling of its U_I, the projection of everything else."""
    return coupling_name(coupling) if kind == TensorKind.U_I else projection


def group_module(experts: str, group: int) -> str:
    """Module of a group, in the module of a layer's routed experts."""
    return f"{experts}.group_{group}"

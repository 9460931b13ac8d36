"""Layouts of routed experts on disk, as values: which tensors hold them, and how.

In a stack (E, H, I) every expert is a matrix (H, I). On disk a linear layer keeps its weight as
(out, in), so gate and up lie as (H, I) and down as (I, H).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from tuckerize.domain import GATE_UP, Coupling, Projection, StackShape, TensorHeader

if TYPE_CHECKING:  # manifests name storages, and are read without torch
    import torch
    from torch import Tensor

    from tuckerize.checkpoint.reader import Checkpoint


class Storage(ABC):
    """Layout of the routed experts of one layer.

    Names are those below some module, the layer say; `within` completes them.
    """

    @property
    def biased(self) -> bool:
        """Whether the projections have biases."""
        return False

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of its tensors, with `{expert}` for the expert's index."""

    def oriented(self, tensors: Mapping[str, TensorHeader], module: str) -> Self:
        """The same layout, transposed where the shapes of its tensors below a module say so."""
        del tensors, module
        return self

    @property
    @abstractmethod
    def together(self) -> tuple[Coupling, ...]:
        """The projections; those that share a tensor stand together."""

    @abstractmethod
    def within(self, module: str) -> Self:
        """The same layout, with names that begin with a module."""

    @abstractmethod
    def tensors(
        self, shape: StackShape, projections: Iterable[Projection] = tuple(Projection)
    ) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that holds the projections of a layer.

        Args:
            shape: Sizes (E, H, I) of the layer's stacks.
            projections: Which of them; all by default.
        """

    @abstractmethod
    def matrix(self, tensors: Mapping[str, Tensor], projection: Projection, expert: int) -> Tensor:
        """View of one expert's matrix (H, I) in the tensors of a layer."""

    @abstractmethod
    def read_into(
        self, stack_EHI: Tensor, checkpoint: Checkpoint, projection: Projection, experts: range
    ) -> None:
        """Fill a stack with consecutive experts; the others are not loaded.

        Raises:
            CheckpointError: A tensor is missing or cannot be read.
        """

    def write(
        self,
        shape: StackShape,
        projections: Coupling,
        matrices: Iterable[tuple[Projection, int, Tensor]],
        dtype: torch.dtype,
        biases: Mapping[Projection, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Tensors that hold projections of a layer, by name.

        Args:
            shape: Sizes (E, H, I) of the layer's stacks.
            projections: The projections, one or more members of `together`.
            matrices: Projection, expert and matrix (H, I) of all experts of these projections, in
                any order; one is taken at a time.
            dtype: Type of the tensors.
            biases: Biases of the projections, shape (E, H), of down (E, I).
        """
        import torch

        tensors = {
            name: torch.empty(size, dtype=dtype)
            for name, size in self.tensors(shape, projections).items()
        }
        for projection, expert, matrix_HI in matrices:
            self.matrix(tensors, projection, expert).copy_(matrix_HI)
        for projection, bias in (biases or {}).items():
            self.bias(tensors, projection).copy_(bias)
        return tensors

    def bias(self, tensors: Mapping[str, Tensor], projection: Projection) -> Tensor:
        """View of a projection's biases in the tensors of a layer, shape (E, H), of down (E, I)."""
        raise NotImplementedError

    def read_bias(self, checkpoint: Checkpoint, projection: Projection) -> Tensor:
        """Biases of a projection of all experts.

        Raises:
            CheckpointError: A tensor is missing or cannot be read.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class PerExpert(Storage):
    """One tensor per projection and expert; of all experts where the names lack `{expert}`.

    Those of all experts are (E, H, I), and (E, I, H) of down, as in Step-3.5.

    Attributes:
        gate: Name of the weight of gate_proj, with `{expert}` for the expert's index.
        up: The same of up_proj.
        down: The same of down_proj.
    """

    gate: str
    up: str
    down: str

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its tensors, with `{expert}` for the expert's index."""
        return self.gate, self.up, self.down

    @property
    def together(self) -> tuple[Coupling, ...]:
        """The projections; those that share a tensor stand together."""
        return tuple((projection,) for projection in Projection)

    def within(self, module: str) -> Self:
        """The same layout, with names that begin with a module."""
        return replace(
            self,
            gate=f"{module}.{self.gate}",
            up=f"{module}.{self.up}",
            down=f"{module}.{self.down}",
        )

    def tensors(
        self, shape: StackShape, projections: Iterable[Projection] = tuple(Projection)
    ) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that holds the projections of a layer."""
        wide, tall = (shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)
        stacked = (shape.experts,) if self.is_stacked else ()
        return {
            self._name(projection, expert): (
                *stacked,
                *(tall if projection == Projection.DOWN else wide),
            )
            for projection in projections
            for expert in range(1 if stacked else shape.experts)
        }

    def matrix(self, tensors: Mapping[str, Tensor], projection: Projection, expert: int) -> Tensor:
        """View of one expert's matrix (H, I) in the tensors of a layer."""
        weight = tensors[self._name(projection, expert)]
        own = weight[expert] if self.is_stacked else weight
        return own.T if projection == Projection.DOWN else own

    def read_into(
        self, stack_EHI: Tensor, checkpoint: Checkpoint, projection: Projection, experts: range
    ) -> None:
        """Fill a stack with consecutive experts; the others are not loaded."""
        if self.is_stacked:
            for _, weights in checkpoint.read([self._name(projection, 0)], rows=experts):
                stack_EHI.copy_(weights.mT if projection == Projection.DOWN else weights)
            return
        expert_of = {self._name(projection, expert): expert for expert in experts}
        for name, weight in checkpoint.read(expert_of):
            expert = expert_of[name]
            place = experts.index(expert)
            stack_EHI[place] = self.matrix({name: weight}, projection, expert)

    @property
    def is_stacked(self) -> bool:
        """Whether a tensor holds all experts."""
        return "{expert}" not in self.gate

    def _name(self, projection: Projection, expert: int) -> str:
        names = dict(zip(Projection, (self.gate, self.up, self.down), strict=True))
        return names[projection].format(expert=expert)


@dataclass(frozen=True, slots=True)
class Packed(Storage):
    """One tensor for gate and up of all experts, one for down.

    They are (E, 2H, I) and (E, I, H), as transformers' fused modules have them (Qwen3-MoE, say), or
    (E, I, 2H) and (E, H, I) where those are transposed (Llama 4, gpt-oss).

    Attributes:
        gate_up: Name of the tensor of gate and up.
        down: Name of the tensor of down.
        interleaved: Whether rows of gate and up alternate, as in gpt-oss; all of gate come before
            all of up otherwise.
        transposed: Whether weights lie as (in, out).
        biased: Whether there are biases, (E, 2H) and (E, I), by the same names and `_bias`.
    """

    gate_up: str
    down: str
    interleaved: bool = False
    transposed: bool = False
    biased: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its tensors."""
        return self.gate_up, self.down

    def oriented(self, tensors: Mapping[str, TensorHeader], module: str) -> Self:
        """The same layout, transposed where the shapes of its tensors below a module say so.

        The neurons are twice as many in gate and up as in down, on one side or the other.
        """
        names = [f"{module}.{name}" for name in self.names]
        found = [tensors[name].shape for name in names if name in tensors]
        if [len(shape) for shape in found] != [3, 3]:
            return self
        gate_up, down = found
        return replace(self, transposed=gate_up[2] == 2 * down[1] and gate_up[1] == down[2])

    @property
    def together(self) -> tuple[Coupling, ...]:
        """The projections; those that share a tensor stand together."""
        return GATE_UP, (Projection.DOWN,)

    def within(self, module: str) -> Self:
        """The same layout, with names that begin with a module."""
        return replace(self, gate_up=f"{module}.{self.gate_up}", down=f"{module}.{self.down}")

    def tensors(
        self, shape: StackShape, projections: Iterable[Projection] = tuple(Projection)
    ) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that holds the projections of a layer."""
        experts, rows, columns = shape
        gate_up, down = (2 * rows, columns), (columns, rows)
        sizes = {self.gate_up: gate_up, self.down: down}
        names = dict.fromkeys(map(self._name, projections))
        found: dict[str, tuple[int, ...]] = {
            name: (experts, *(reversed(sizes[name]) if self.transposed else sizes[name]))
            for name in names
        }
        biases = {f"{name}_bias": (experts, sizes[name][0]) for name in names if self.biased}
        return found | biases

    def matrix(self, tensors: Mapping[str, Tensor], projection: Projection, expert: int) -> Tensor:
        """View of one expert's matrix (H, I) in the tensors of a layer."""
        return self._stack(tensors[self._name(projection)], projection)[expert]

    def read_into(
        self, stack_EHI: Tensor, checkpoint: Checkpoint, projection: Projection, experts: range
    ) -> None:
        """Fill a stack with consecutive experts; the others are not loaded."""
        for _, weights in checkpoint.read([self._name(projection)], rows=experts):
            stack_EHI.copy_(self._stack(weights, projection))

    def bias(self, tensors: Mapping[str, Tensor], projection: Projection) -> Tensor:
        """View of a projection's biases in the tensors of a layer, shape (E, H), of down (E, I)."""
        biases = tensors[f"{self._name(projection)}_bias"]
        return biases if projection == Projection.DOWN else self._part(biases, projection)

    def read_bias(self, checkpoint: Checkpoint, projection: Projection) -> Tensor:
        """Biases of a projection of all experts."""
        name = f"{self._name(projection)}_bias"
        return self.bias({name: checkpoint.read_one(name)}, projection)

    def _name(self, projection: Projection) -> str:
        return self.down if projection == Projection.DOWN else self.gate_up

    def _stack(self, weights: Tensor, projection: Projection) -> Tensor:
        """View of the stack of one projection in the tensor of some experts."""
        if projection == Projection.DOWN:
            return weights if self.transposed else weights.mT
        both = weights.mT if self.transposed else weights
        return self._part(both, projection)

    def _part(self, both: Tensor, projection: Projection) -> Tensor:
        """View of gate or of up in a tensor of both."""
        place = GATE_UP.index(projection)
        return both[:, place::2] if self.interleaved else both.chunk(2, dim=1)[place]


GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
W1_W3_W2 = ("w1", "w3", "w2")


def per_expert(experts: str, names: tuple[str, str, str] = GATE_UP_DOWN) -> PerExpert:
    """One linear layer per expert and projection, below a module of experts."""
    return PerExpert(*(f"{experts}.{{expert}}.{name}.weight" for name in names))


def packed(experts: str) -> Packed:
    """Transformers' own tensors of all experts, below a module of experts."""
    return Packed(f"{experts}.gate_up_proj", f"{experts}.down_proj")

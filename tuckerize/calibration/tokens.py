"""Tokens before the routed experts of one layer, and the dense experts themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tuckerize.calibration.rows import joined
from tuckerize.domain import GATE_UP, Projection, StackShape
from tuckerize.names import TensorName

PART_TOKENS = 2048
"""Tokens of an expert whose neurons are computed at once. A CPU allocator uses their memory again;
that of more is mapped anew for every operation, page by page."""
HELD_OUT_BLOCK = 512
"""Every 16th block of so many tokens is the validation set: it decides, and is never fitted."""
_HELD_OUT_EVERY = 16

# Tokens that an expert is fitted to, in multiples of the unknowns of a row: fewer of its own are
# filled up from the layer, at this weight relative to the mean routing weight. Measured on trained
# layers (docs/explanation/calibration.md): without them, few tokens are interpolated, not fitted.
_TOKENS_PER_UNKNOWN = 4
_POOLED_WEIGHT = 0.3
# The same of a profile, where fewer do not change an error by more than some percent.
_PROFILED_TOKENS_PER_UNKNOWN = 32


def fewest_tokens() -> int:
    """Smallest number of tokens of which some are in the validation set."""
    return HELD_OUT_BLOCK * (_HELD_OUT_EVERY - 1) + 1


def enough_tokens(shape: StackShape) -> int:
    """Tokens of one expert that determine least squares of all its projections."""
    return _TOKENS_PER_UNKNOWN * max(shape.intermediate, shape.hidden)


class ExpertTokens(NamedTuple):
    """Tokens of one expert.

    Attributes:
        x_NI: Tokens, shape (N, I).
        weights_N: Their routing weights, shape (N,).
        routed: Number of those that the router sent; they are the first.
        places_N: Their indices among the layer's tokens, shape (N,).
        pooled_count: Weight of each of the others in a mean without routing weights.
    """

    x_NI: Tensor
    weights_N: Tensor
    routed: int
    places_N: Tensor
    pooled_count: float = _POOLED_WEIGHT**2

    @property
    def counts_N(self) -> Tensor:  # noqa: N802
        """Weight of each token in a mean without routing weights, shape (N,)."""
        counts_N = torch.ones_like(self.weights_N)
        counts_N[self.routed :] = self.pooled_count
        return counts_N

    def parts(self) -> Iterator[ExpertTokens]:
        """The tokens, as many as are computed with at once."""
        for first in range(0, len(self.weights_N), PART_TOKENS):
            own = slice(first, first + PART_TOKENS)
            routed = min(max(0, self.routed - first), PART_TOKENS)
            yield self._replace(
                x_NI=self.x_NI[own],
                weights_N=self.weights_N[own],
                routed=routed,
                places_N=self.places_N[own],
            )

    def thinned(self, most: int) -> ExpertTokens:
        """Every n-th token, so that fewer than twice as many are left.

        Args:
            most: Number of tokens of which all are kept.
        """
        step = max(1, len(self.weights_N) // most)
        x_NI, weights_N, places_N = (
            own[::step] for own in (self.x_NI, self.weights_N, self.places_N)
        )
        return self._replace(
            x_NI=x_NI, weights_N=weights_N, routed=-(-self.routed // step), places_N=places_N
        )


class LayerTokens(NamedTuple):
    """Tokens before the routed experts of a layer.

    Attributes:
        x_TI: Tokens, shape (T, I).
        experts_Tk: Experts of each token, shape (T, k).
        weights_Tk: Their routing weights, shape (T, k); `CalibrationPass.capture` gives them
            relative to the norms of the hidden states.
    """

    x_TI: Tensor
    experts_Tk: Tensor
    weights_Tk: Tensor

    def part(self, places: Tensor | slice) -> LayerTokens:
        """The tokens at some indices."""
        return LayerTokens(self.x_TI[places], self.experts_Tk[places], self.weights_Tk[places])

    def split(self, folder: Path | None = None) -> tuple[LayerTokens, LayerTokens]:
        """Tokens to fit, and the validation set, which is empty where there are few.

        Args:
            folder: Of a file that holds those to fit; see `Rows`.
        """
        block = torch.arange(len(self.x_TI), device=self.x_TI.device) // HELD_OUT_BLOCK
        held_out = block % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
        places = (~held_out).nonzero()[:, 0]
        blocks = torch.split(places, HELD_OUT_BLOCK)
        x_TI = joined((self.x_TI[own] for own in blocks), len(places), folder)
        fit = LayerTokens(x_TI, self.experts_Tk[places], self.weights_Tk[places])
        return fit, self.part(held_out.nonzero()[:, 0])

    def of_expert(self, expert: int, least: int, pooled: int | None = None) -> ExpertTokens:
        """The tokens of one expert, filled up from the whole layer where there are too few.

        Args:
            expert: Index of the expert in the layer.
            least: Smallest number of tokens whose second moment is reliable.
            pooled: Most tokens that fill it up, each of which then counts for several, others for
                other experts; all by default.
        """
        places_N, chosen_N = (self.experts_Tk == expert).nonzero(as_tuple=True)
        weights_N = self.weights_Tk[places_N, chosen_N].to(self.x_TI.dtype)
        routed = len(places_N)
        each = 1.0
        if wanted := min(max(0, least - routed), len(self.x_TI)):
            count = min(wanted, pooled or wanted)
            each = wanted / count
            more = torch.arange(count, device=places_N.device) * len(self.x_TI) // count
            more += expert % (wanted // count)
            weight = _POOLED_WEIGHT * float(self.weights_Tk.mean()) * each**0.5
            places_N = torch.cat([places_N, more])
            weights_N = torch.cat([weights_N, weights_N.new_full((count,), weight)])
        x_NI = self.x_TI[places_N]
        return ExpertTokens(x_NI, weights_N, routed, places_N, each * _POOLED_WEIGHT**2)


@dataclass(frozen=True, slots=True)
class StacksOnDisk(Mapping[Projection, Tensor]):
    """Stacks that are read again whenever they are used, for layers that memory cannot hold.

    Attributes:
        read: Reads the matrices (E, H, I) of some experts of the layer, in float32.
        experts: Which experts of the layer they are.
        shape: Sizes (E, H, I).
    """

    read: Callable[[Projection, range], Tensor]
    experts: range
    shape: StackShape

    def __getitem__(self, projection: Projection) -> Tensor:
        """A whole stack, which is as large as memory is asked for it."""
        return self.read(projection, self.experts)

    def __iter__(self) -> Iterator[Projection]:
        """The projections."""
        return iter(Projection)

    def __len__(self) -> int:
        """Number of projections."""
        return len(Projection)

    def matrix(self, projection: Projection, place: int) -> Tensor:
        """The matrix of one expert, shape (H, I)."""
        return self.read(projection, self.experts[place : place + 1])[0]


@dataclass(frozen=True, slots=True)
class DenseGroup:
    """The dense experts of one group, all in stack orientation.

    Attributes:
        stacks: gate_proj, up_proj and down_proj, each of shape (E, H, I).
        experts: Which experts of the layer they are; this process's, where several share the group.
        biases: Their biases, shape (E, H); of down (E, I) those of all experts of the group, where
            processes share it; empty if they have none.
    """

    stacks: Mapping[Projection, Tensor]
    experts: range
    biases: Mapping[Projection, Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> StackShape:
        """Sizes (E, H, I)."""
        if isinstance(self.stacks, StacksOnDisk):
            return self.stacks.shape
        return StackShape(*self.stacks[Projection.GATE].shape)

    @property
    def enough_tokens(self) -> int:
        """Tokens of one expert that determine least squares of all its projections."""
        return enough_tokens(self.shape)

    @property
    def enough_for_down(self) -> int:
        """Tokens of one expert that determine least squares of down."""
        return _TOKENS_PER_UNKNOWN * self.shape.intermediate

    @property
    def profiled_tokens(self) -> int:
        """Tokens of one expert on which a profile tries sizes and encodings."""
        return _PROFILED_TOKENS_PER_UNKNOWN * max(self.shape.intermediate, self.shape.hidden)

    def matrix(self, projection: Projection, place: int) -> Tensor:
        """The matrix of one expert, shape (H, I): no other one is read where they are on disk.

        Args:
            projection: Which of its matrices.
            place: Index of the expert in the group.
        """
        if isinstance(self.stacks, StacksOnDisk):
            return self.stacks.matrix(projection, place)
        return self.stacks[projection][place]

    def part(self, place: int) -> DenseGroup:
        """One expert alone, in memory.

        Args:
            place: Index of the expert in the group.
        """
        own = slice(place, place + 1)
        stacks = {projection: self.matrix(projection, place)[None] for projection in Projection}
        biases = {p: b if p == Projection.DOWN else b[own] for p, b in self.biases.items()}
        return DenseGroup(stacks, self.experts[own], biases)

    def without_neurons(self, gone_EM: Tensor) -> DenseGroup:
        """The same experts with some rows of down set to zero.

        Args:
            gone_EM: Indices of the neurons of every expert, shape (E, M).
        """
        stacks, first = self.stacks, self.experts.start

        def zeroed(down_EHI: Tensor, experts: range) -> Tensor:
            gone = gone_EM[experts.start - first : experts.stop - first, :, None]
            return down_EHI.scatter(1, gone.expand(-1, -1, down_EHI.shape[2]), 0.0)

        if not isinstance(stacks, StacksOnDisk):
            down = zeroed(stacks[Projection.DOWN], self.experts)
            return replace(self, stacks={**stacks, Projection.DOWN: down})

        def read(projection: Projection, experts: range) -> Tensor:
            found = stacks.read(projection, experts)
            return zeroed(found, experts) if projection == Projection.DOWN else found

        return replace(self, stacks=replace(stacks, read=read))

    def as_tensors(self) -> dict[TensorName, Tensor]:
        """As the tensors of a group of which every mode is full; without values if on disk."""
        stacks = self.stacks
        if isinstance(stacks, StacksOnDisk):
            empty = torch.empty(stacks.shape, device="meta")
            stacks = dict.fromkeys(Projection, empty)
        cores = {TensorName.core(projection): stack for projection, stack in stacks.items()}
        return cores | {
            TensorName.bias(projection): bias for projection, bias in self.biases.items()
        }

    def gate_up(self, place: int, x_NI: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up of tokens in one expert, before the activation, each (N, H).

        Args:
            place: Index of the expert in the group.
            x_NI: Its tokens.
        """
        gate_NH, up_NH = (x_NI @ self.matrix(projection, place).T for projection in GATE_UP)
        if not self.biases:
            return gate_NH, up_NH
        gate_H, up_H = (self.biases[projection][place] for projection in GATE_UP)
        return gate_NH + gate_H, up_NH + up_H

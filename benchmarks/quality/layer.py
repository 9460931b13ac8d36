"""What a compression method gets, what it gives back, and how far apart the two are.

Letters at the end of tensor names: E experts, H intermediate, I hidden, T tokens, k experts of a
token, N tokens of one expert. `down` has the stack's orientation (E, H, I), as everywhere in this
project: the output of an expert is `activation @ down`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import silu

from benchmarks.quality.encodings import Encoding

Stacks = tuple[Tensor, Tensor, Tensor]
"""Gate, up and transposed down projections, (E, H, I) each."""

# Tokens on which candidates of one method are compared.
_TOKENS_TO_COMPARE = 4096


@dataclass(frozen=True)
class Sensitivity:
    """Derivatives of the calibration loss, for the methods that ask for them.

    Attributes:
        fisher: Mean squared gradients of gate, up and down over the windows.
        output_EII: Mean outer product of the gradient by the layer's routed output, over the tokens
            of each expert, (E, I, I).
    """

    fisher: Stacks
    output_EII: Tensor


@dataclass(frozen=True, eq=False)
class Layer:
    """The routed experts of one layer and the calibration tokens that reached them.

    Attributes:
        stacks: Gate, up and transposed down projections, (E, H, I) each.
        x_TI: Inputs of the routed experts, (T, I).
        experts_Tk: Experts of every token, (T, k).
        weights_Tk: Their routing weights, as they multiply the experts' outputs, (T, k).
        sensitivity: Derivatives of the loss, where they were collected.
        decoder_norms_T: Norms of the whole decoder layer's output, where they were collected, (T,).
    """

    stacks: Stacks
    x_TI: Tensor
    experts_Tk: Tensor
    weights_Tk: Tensor
    sensitivity: Sensitivity | None = None
    decoder_norms_T: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sizes (E, H, I)."""
        experts, intermediate, hidden = self.stacks[0].shape
        return experts, intermediate, hidden

    @property
    def dense(self) -> int:
        """Numbers of the dense layer."""
        return sum(stack.numel() for stack in self.stacks)

    @cached_property
    def tokens(self) -> list[tuple[Tensor, Tensor]]:
        """For every expert the inputs (N, I) and the routing weights (N,) of its tokens."""
        found = []
        for expert in range(self.shape[0]):
            rows, slots = torch.where(self.experts_Tk == expert)
            found.append((self.x_TI[rows], self.weights_Tk[rows, slots]))
        return found

    def activations(self, expert: int) -> Tensor:
        """Intermediate activations silu(x gateᵀ) ⊙ (x upᵀ) of an expert's tokens, (N, H)."""
        x_NI, _ = self.tokens[expert]
        gate_EHI, up_EHI, _ = self.stacks
        return silu(x_NI @ gate_EHI[expert].T) * (x_NI @ up_EHI[expert].T)

    @cached_property
    def _moments(self) -> dict[tuple[str, bool], Tensor]:
        return {}

    def input_moments(self, *, weighted: bool = False) -> Tensor:
        """Second moments of every expert's inputs, summed over its tokens, (E, I, I), float64.

        Args:
            weighted: Whether each token counts with the square of its routing weight.
        """
        if ("input", weighted) not in self._moments:
            moments = [_moment(x_NI, w_N, weighted=weighted) for x_NI, w_N in self.tokens]
            self._moments["input", weighted] = torch.stack(moments)
        return self._moments["input", weighted]

    def activation_moments(self, *, weighted: bool = False) -> Tensor:
        """The same of the intermediate activations, (E, H, H), float64."""
        if ("activation", weighted) not in self._moments:
            moments = [
                _moment(self.activations(expert), w_N, weighted=weighted)
                for expert, (_, w_N) in enumerate(self.tokens)
            ]
            self._moments["activation", weighted] = torch.stack(moments)
        return self._moments["activation", weighted]

    @cached_property
    def few_tokens(self) -> Layer:
        """The same layer with few enough tokens for comparing candidates."""
        step = max(1, len(self.x_TI) // _TOKENS_TO_COMPARE)
        return replace(
            self,
            x_TI=self.x_TI[::step],
            experts_Tk=self.experts_Tk[::step],
            weights_Tk=self.weights_Tk[::step],
            decoder_norms_T=None if self.decoder_norms_T is None else self.decoder_norms_T[::step],
        )

    @cached_property
    def output(self) -> Tensor:
        """What the routed experts add to every token, (T, I)."""
        return self.output_of(self.stacks)

    def output_of(self, stacks: Stacks) -> Tensor:
        """The same with other weights and this layer's routing, (T, I)."""
        gate_EHI, up_EHI, down_EHI = stacks
        output_TI = torch.zeros_like(self.x_TI)
        for expert in range(len(gate_EHI)):
            rows, slots = torch.where(self.experts_Tk == expert)
            x_NI = self.x_TI[rows]
            active_NH = silu(x_NI @ gate_EHI[expert].T) * (x_NI @ up_EHI[expert].T)
            weight_N1 = self.weights_Tk[rows, slots, None]
            output_TI.index_add_(0, rows, active_NH @ down_EHI[expert] * weight_N1)
        return output_TI


@dataclass(frozen=True)
class Compressed:
    """A layer's routed experts after compression.

    Attributes:
        stacks: The weights that are in effect, expanded from `parts`.
        parts: Every tensor that has to be stored: factors, cores, bases, coefficients, rows.
        kept_experts: Where whole experts are gone: those that the router may still choose.
        shared_EH: Where neurons are stored once for all experts: whether neuron h of expert e is
            the shared neuron h, (E, H).
        basis_IR: Where gate and up read a latent space: its orthonormal basis, stored in 16 bits.
        rounded: Where parts are inside a nonlinearity: the stacks of rounded ones, and their bits.
    """

    stacks: Stacks
    parts: tuple[Tensor, ...]
    kept_experts: tuple[int, ...] | None = None
    shared_EH: Tensor | None = None
    basis_IR: Tensor | None = None
    rounded: Callable[[Encoding], tuple[Stacks, int]] | None = None

    @property
    def stored(self) -> int:
        """Numbers that have to be stored."""
        return sum(part.numel() for part in self.parts)


Method = Callable[[Sequence[Layer], float], list[Compressed]]
"""All MoE layers of a model and the kept share of their numbers -> the compressed layers."""


def triple(stacks: Iterable[Tensor]) -> Stacks:
    """Gate, up and down from whatever gives the three."""
    gate_EHI, up_EHI, down_EHI = stacks
    return gate_EHI, up_EHI, down_EHI


def dense(layer: Layer) -> Compressed:
    """The layer as it is."""
    return Compressed(layer.stacks, layer.stacks)


def layer_by_layer(compress: Callable[[Layer, float], Compressed]) -> Method:
    """The method that gives every layer the same share; at 1 nothing is compressed."""

    def method(layers: Sequence[Layer], keep: float) -> list[Compressed]:
        return [dense(layer) if keep >= 1 else compress(layer, keep) for layer in layers]

    method.__doc__ = compress.__doc__
    return method


def best_of(layer: Layer, candidates: Iterable[Compressed]) -> Compressed:
    """Of several ways to spend the same budget, the one with the least output error.

    So every method is tuned, on calibration tokens, where its paper leaves something free.
    """
    return min(candidates, key=lambda candidate: output_error(layer.few_tokens, candidate))


def output_error(layer: Layer, compressed: Compressed) -> float:
    """Relative error ‖y − ŷ‖ / ‖y‖ of the routed output on the layer's tokens, routed as before."""
    missed_TI = layer.output_of(compressed.stacks) - layer.output
    return float(missed_TI.norm() / layer.output.norm())


def roots(moments_ENN: Tensor, floor: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Symmetric square roots of second moments and their inverses, (E, N, N) each, float64.

    Eigenvalues below `floor` times the largest of their expert are raised to it. An expert with
    hardly a token gets the mean moment of all of them added.

    Args:
        moments_ENN: Sums over tokens of outer products, (E, N, N).
        floor: Relative eigenvalue floor (unitless).
    """
    pooled_NN = moments_ENN.mean(0)
    moments_ENN = moments_ENN + 1e-3 * pooled_NN
    values_EN, vectors_ENN = torch.linalg.eigh(moments_ENN)
    values_EN = values_EN.clamp_min(floor * values_EN[:, -1:])
    scaled_ENN = vectors_ENN * values_EN.sqrt()[:, None]
    inverse_ENN = vectors_ENN * values_EN.rsqrt()[:, None]
    return scaled_ENN @ vectors_ENN.mT, inverse_ENN @ vectors_ENN.mT


def _moment(rows_NM: Tensor, weights_N: Tensor, *, weighted: bool) -> Tensor:
    if weighted:
        rows_NM = rows_NM * weights_N[:, None]
    # Tens of thousands of rows add up in float32 to about 1e-6: below every floor that is used.
    return (rows_NM.T @ rows_NM).double()

"""Routed experts of a dense layer, expert by expert: the reference of a Tucker layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import linear

from tuckerize.runtime.activations import Activation


class ExpertWeights(NamedTuple):
    """Matrices of one expert as on disk: gate and up (H, I), down (I, H)."""

    gate_HI: Tensor
    up_HI: Tensor
    down_IH: Tensor


def dense_output(
    x_TI: Tensor,
    experts_Tk: Tensor,
    weights_Tk: Tensor,
    *,
    expert_weights: Callable[[int], ExpertWeights],
    activation: Activation,
    biases: Sequence[Sequence[Tensor]] = (),
) -> Tensor:
    """Routed output of tokens through dense experts, shape (T, I), in the tokens' dtype.

    Args:
        x_TI: Tokens, shape (T, I).
        experts_Tk: Experts of each token, shape (T, k).
        weights_Tk: Routing weights, shape (T, k).
        expert_weights: Reads the matrices of one expert; called once per expert with tokens.
        activation: From gate and up to neurons.
        biases: Biases of gate, up and down of every expert; empty if they have none.
    """
    output_TI = x_TI.new_zeros(x_TI.shape)
    for expert in sorted(set(experts_Tk.flatten().tolist())):
        tokens, places = (experts_Tk == expert).nonzero(as_tuple=True)
        matrices = [matrix.to(x_TI.dtype) for matrix in expert_weights(expert)]
        own = [bias[expert].to(x_TI.dtype) for bias in biases] or [None] * 3
        gate_NH, up_NH = map(partial(linear, x_TI[tokens]), matrices[:2], own[:2])
        result_NI = linear(activation(gate_NH, up_NH), matrices[2], own[2])
        weights_N1 = weights_Tk[tokens, places].to(x_TI.dtype).unsqueeze(1)
        output_TI.index_add_(0, tokens, weights_N1 * result_NI)
    return output_TI

"""Structures whose matrices are quantised: what is stored, layer after layer, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from benchmarks.quality.encodings import LEARNED, ROUNDINGS, Encoding
from benchmarks.quality.layer import Compressed, Layer, Stacks, triple
from benchmarks.quality.learned import learn
from benchmarks.quality.models import MoeModel


@dataclass(frozen=True)
class Costs:
    """What a token costs in the routed experts, over the dense model (unitless).

    Attributes:
        multiply_adds: Of all products.
        tp_traffic: Values that tensor parallelism sums over processes.
        ep_traffic: Values that expert parallelism dispatches and combines.
    """

    multiply_adds: float
    tp_traffic: float = 1.0
    ep_traffic: float = 1.0


def quantise(
    model: MoeModel,
    compressed: Sequence[Compressed],
    tokens: Tensor,
    encoding: Encoding,
    rounding: str,
) -> int:
    """Put compressed and quantised experts into a model: the bits that they take.

    Every layer is rounded for what the quantised layers before it give, and down for what the
    quantised gate and up give. Neurons that are gone, rows of zeros, are not stored.
    """
    model.replace(compressed)
    stored = 0

    def treat(layer: Layer) -> Stacks:
        nonlocal stored
        stacks, bits = _round(layer, encoding, rounding)
        stored += bits
        return stacks

    model.sequentially(tokens, treat)
    return stored


def _round(layer: Layer, encoding: Encoding, rounding: str) -> tuple[Stacks, int]:
    """The values of a layer's stacks as stored, and the bits that they take."""
    rows = [_neurons(layer, expert) for expert in range(layer.shape[0])]
    widths = [len(own) for own in rows]
    hidden = layer.shape[2]
    gate_EKI, up_EKI, down_EKI = (_narrow(stack, rows) for stack in layer.stacks)
    inputs_EII = layer.input_moments(weighted=True).float()
    treat = ROUNDINGS[rounding]
    gate, up = (treat(own, encoding, inputs_EII) for own in (gate_EKI, up_EKI))
    moments = []
    for (x_NI, w_N), gate_KI, up_KI in zip(layer.tokens, gate.values, up.values, strict=True):
        active_NK = silu(x_NI @ gate_KI.T) * (x_NI @ up_KI.T) * w_N[:, None]
        moments.append(active_NK.T @ active_NK)
    down = treat(down_EKI.mT.contiguous(), encoding, torch.stack(moments))
    if rounding == LEARNED:
        stored = learn(layer, (gate_EKI, up_EKI, down_EKI.mT), (gate, up, down), encoding)
    else:
        stored = (gate.values, up.values, down.values.mT)
    bits = sum(
        2 * encoding.stored_bits(width, hidden) + encoding.stored_bits(hidden, width)
        for width in widths
    )
    return triple(_widened(part, layer, rows) for part in stored), bits


def _neurons(layer: Layer, expert: int) -> Tensor:
    """Neurons of an expert that are there."""
    return (
        torch.stack([stack[expert].abs().sum(-1) for stack in layer.stacks]).sum(0).nonzero()[:, 0]
    )


def _narrow(stack_EHI: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """The rows of every expert, filled up with zeros to the widest, (E, K, I)."""
    width = max(len(own) for own in rows)
    narrow = stack_EHI.new_zeros(len(rows), width, stack_EHI.shape[2])
    for expert, own in enumerate(rows):
        narrow[expert, : len(own)] = stack_EHI[expert, own]
    return narrow


def _widened(narrow_EKI: Tensor, layer: Layer, rows: Sequence[Tensor]) -> Tensor:
    stack_EHI = torch.zeros_like(layer.stacks[0])
    for expert, own in enumerate(rows):
        stack_EHI[expert, own] = narrow_EKI[expert, : len(own)]
    return stack_EHI


def costs(layers: Sequence[Layer], compressed: Sequence[Compressed]) -> Costs:
    """Of narrower experts; removed ones leave as many to every token as before."""
    shares = []
    for layer, own in zip(layers, compressed, strict=True):
        if own.kept_experts is not None:
            return Costs(1.0)
        uses_E = torch.bincount(layer.experts_Tk.flatten(), minlength=layer.shape[0]).double()
        kept_E = (own.stacks[2].abs().sum(-1) > 0).double().mean(-1)
        shares.append(float((uses_E * kept_E).sum() / uses_E.sum()))
    return Costs(sum(shares) / len(shares))

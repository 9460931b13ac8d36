"""Structures whose matrices are quantised: what is stored, layer after layer, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from benchmarks.quality.encodings import LEARNED, ROUNDINGS, Encoding, Rounded
from benchmarks.quality.layer import Compressed, Layer, Stacks, triple
from benchmarks.quality.learned import learn
from benchmarks.quality.models import MoeModel
from benchmarks.quality.trellis import Trellis, trellis_coded

QTIP = "QTIP"
"""Rounding to trellis codes."""
_BASIS_BITS = 16


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
    encoding: Encoding | Trellis,
    rounding: str,
) -> int:
    """Put compressed and quantised experts into a model: the bits that they take.

    Every layer is rounded for what the quantised layers before it give, and down for what the
    quantised gate and up give. Neurons that are gone, rows of zeros, are not stored.
    """
    model.replace(compressed)
    own = iter(compressed)
    stored = 0

    def treat(layer: Layer) -> Stacks:
        nonlocal stored
        stacks, bits = _round(layer, next(own), encoding, rounding)
        stored += bits
        return stacks

    model.sequentially(tokens, treat)
    return stored


def _round(
    layer: Layer, compressed: Compressed, encoding: Encoding | Trellis, rounding: str
) -> tuple[Stacks, int]:
    """The values of a layer's stacks as stored, and the bits that they take.

    Neurons that experts share are rounded once, for the tokens of all that read them. Gate and up
    of a latent space are rounded there, for the tokens that are projected to it.
    """
    shared_EH, basis_IR = compressed.shared_EH, compressed.basis_IR
    if rounding == LEARNED and (shared_EH is not None or basis_IR is not None):
        raise ValueError("learned rounding is made for neurons of experts alone")
    experts, _, hidden = layer.shape
    sets = layer.stacks
    readers: list[tuple[int, ...]] = [(expert,) for expert in range(experts)]
    if shared_EH is not None:
        sets = triple(_with_shared_set(stack, shared_EH) for stack in sets)
        readers.append(tuple(range(experts)))
    rows = [_neurons(sets, index) for index in range(len(readers))]
    widths = [len(own) for own in rows]
    gate_SKI, up_SKI, down_SKI = (_narrow(stack, rows) for stack in sets)
    inputs_EII = layer.input_moments(weighted=True).float()
    inputs_SII = torch.stack([inputs_EII[list(own)].sum(0) for own in readers])
    fitted: list[Rounded] = []

    def treat(matrices_SOK: Tensor, moments_SKK: Tensor) -> Tensor:
        if isinstance(encoding, Trellis):
            return trellis_coded(matrices_SOK, encoding, moments_SKK)
        fitted.append(ROUNDINGS[rounding](matrices_SOK, encoding, moments_SKK))
        return fitted[-1].values

    gate_up = (gate_SKI, up_SKI)
    latent = hidden
    if basis_IR is None:
        gate, up = (treat(own, inputs_SII) for own in gate_up)
    else:
        latent = basis_IR.shape[1]
        low_SRR = basis_IR.T @ inputs_SII @ basis_IR
        gate, up = (treat(own @ basis_IR, low_SRR) @ basis_IR.T for own in gate_up)
    neurons_SKK = _neuron_moments(layer, readers, rows, (gate, up), shared_EH)
    down = treat(down_SKI.mT.contiguous(), neurons_SKK)
    stored = (gate, up, down.mT)
    if rounding == LEARNED and not isinstance(encoding, Trellis):
        stored = learn(layer, (*gate_up, down_SKI.mT), fitted, encoding)
    bits = sum(
        2 * encoding.stored_bits(width, latent) + encoding.stored_bits(hidden, width)
        for width in widths
    )
    if basis_IR is not None:
        bits += _BASIS_BITS * basis_IR.numel()
    found = triple(_widened(part, sets[0], rows) for part in stored)
    if shared_EH is not None:
        found = triple(s[:-1] + shared_EH[..., None] * s[-1] for s in found)
    return found, bits


def _neuron_moments(
    layer: Layer,
    readers: Sequence[tuple[int, ...]],
    rows: Sequence[Tensor],
    gate_up: tuple[Tensor, Tensor],
    shared_EH: Tensor | None,
) -> Tensor:
    """Second moments of the neurons of every set, summed over the tokens of its readers, (S, K, K).

    Args:
        layer: Its tokens.
        readers: Experts that read every set.
        rows: Neurons of every set.
        gate_up: Gate and up as stored, (S, K, I) each.
        shared_EH: Whether neuron h of expert e is the shared one.
    """
    moments = []
    for own, members, gate_KI, up_KI in zip(rows, readers, *gate_up, strict=True):
        moment_KK = torch.zeros(len(gate_KI), len(gate_KI))
        for expert in members:
            x_NI, w_N = layer.tokens[expert]
            active_NK = silu(x_NI @ gate_KI.T) * (x_NI @ up_KI.T) * w_N[:, None]
            if shared_EH is not None and len(members) > 1:
                active_NK[:, : len(own)] *= shared_EH[expert, own]
            moment_KK += active_NK.T @ active_NK
        moments.append(moment_KK)
    return torch.stack(moments)


def _with_shared_set(stack_EHI: Tensor, shared_EH: Tensor) -> Tensor:
    """Neurons of the experts' own, and as another set those that they share, (E + 1, H, I)."""
    reader_H = shared_EH.int().argmax(0)
    shared_HI = stack_EHI[reader_H, torch.arange(len(reader_H))] * shared_EH.any(0)[:, None]
    return torch.cat((stack_EHI * ~shared_EH[..., None], shared_HI[None]))


def _neurons(stacks: Stacks, index: int) -> Tensor:
    """Neurons of an expert that are there."""
    return torch.stack([stack[index].abs().sum(-1) for stack in stacks]).sum(0).nonzero()[:, 0]


def _narrow(stack_EHI: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """The rows of every expert, filled up with zeros to the widest, (E, K, I)."""
    width = max(len(own) for own in rows)
    narrow = stack_EHI.new_zeros(len(rows), width, stack_EHI.shape[2])
    for expert, own in enumerate(rows):
        narrow[expert, : len(own)] = stack_EHI[expert, own]
    return narrow


def _widened(narrow_EKI: Tensor, like_EHI: Tensor, rows: Sequence[Tensor]) -> Tensor:
    stack_EHI = torch.zeros_like(like_EHI)
    for expert, own in enumerate(rows):
        stack_EHI[expert, own] = narrow_EKI[expert, : len(own)]
    return stack_EHI


def costs(layers: Sequence[Layer], compressed: Sequence[Compressed]) -> Costs:
    """Of narrower experts; removed ones leave as many to every token as before.

    Shared neurons' gate and up are computed once for a token, and so is their down.
    """
    shares = []
    for layer, own in zip(layers, compressed, strict=True):
        if own.kept_experts is not None:
            return Costs(1.0)
        uses_E = torch.bincount(layer.experts_Tk.flatten(), minlength=layer.shape[0]).double()
        kept_EH = own.stacks[2].abs().sum(-1) > 0
        shared = 0.0
        if own.shared_EH is not None:
            kept_EH &= ~own.shared_EH
            shared = float(own.shared_EH.any(0).double().mean()) / layer.experts_Tk.shape[1]
        shares.append(float((uses_E * kept_EH.double().mean(-1)).sum() / uses_E.sum()) + shared)
    return Costs(sum(shares) / len(shares))

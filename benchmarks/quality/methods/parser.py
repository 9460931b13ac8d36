"""PARSER: one shared set of neurons, and of every expert the neurons that it stands for worst."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn.functional import silu

from benchmarks.quality.budget import largest
from benchmarks.quality.layer import Compressed, Layer, Stacks, best_of, layer_by_layer, triple

_LEAST = 4  # neurons that every expert keeps, as in the paper's code
_MOST_TURNS = 100


@layer_by_layer
def parser(layer: Layer, keep: float) -> Compressed:
    """PARSER (EMNLP 2026, arXiv 2609.00575): shared neurons and the experts' residuals.

    The shared neurons are a Wasserstein barycentre of the experts', which are put into the order
    that fits it best. A neuron keeps its residual, with which it is what it was, where the output
    would miss most without: E‖a d − ā d̄‖² over the expert's tokens, of activations and rows of
    down of its own and of the shared neuron; the largest of all experts together. A residual takes
    as many numbers as the neuron, which is stored in its place. Tuned: barycentre or mean; the
    error by token, as published, or summed over tokens with the square of their routing weight.
    """

    def candidates() -> Iterator[Compressed]:
        points_EHJ = torch.cat(layer.stacks, dim=-1)
        for shared_HJ, order_EH in (barycentre(points_EHJ), (points_EHJ.mean(0), None)):
            stacks = layer.stacks if order_EH is None else _ordered(layer.stacks, order_EH)
            shared = triple(shared_HJ.chunk(3, dim=-1))
            for routed in (False, True):
                errors_EH = _output_errors(layer, stacks, shared, routed=routed)
                yield _with_residuals(stacks, shared, errors_EH, int(keep * layer.dense))

    return best_of(layer, candidates())


def barycentre(points_EHJ: Tensor) -> tuple[Tensor, Tensor]:
    """Points of least mean squared distance to sets of as many points, each in its best order.

    Returns:
        The points (H, J), and for every set which of its points fits each, (E, H).
    """
    shared_HJ = points_EHJ[0]
    order_EH = torch.arange(len(shared_HJ)).expand(len(points_EHJ), -1)
    for _ in range(_MOST_TURNS):
        distances = [torch.cdist(shared_HJ, own_HJ).square() for own_HJ in points_EHJ]
        found_EH = torch.stack([torch.tensor(linear_sum_assignment(d)[1]) for d in distances])
        shared_HJ = _ordered((points_EHJ,), found_EH)[0].mean(0)
        if torch.equal(found_EH, order_EH):
            break
        order_EH = found_EH
    return shared_HJ, order_EH


def _ordered(stacks: tuple[Tensor, ...], order_EH: Tensor) -> Stacks:
    return tuple(s.gather(1, order_EH[..., None].expand_as(s)) for s in stacks)  # type: ignore[return-value]


def _output_errors(layer: Layer, stacks: Stacks, shared: Stacks, *, routed: bool) -> Tensor:
    """Squared error of the output where a shared neuron replaces one of an expert, (E, H)."""
    found = []
    for (x_NI, w_N), *own in zip(layer.tokens, *stacks, strict=True):
        active_NH, shared_NH = (
            silu(x_NI @ gate.T) * (x_NI @ up.T) for gate, up, _ in (own, shared)
        )
        if routed:
            active_NH, shared_NH = active_NH * w_N[:, None], shared_NH * w_N[:, None]
        down_HI, shared_HI = own[2], shared[2]
        error_H = (
            active_NH.square().sum(0) * down_HI.square().sum(-1)
            + shared_NH.square().sum(0) * shared_HI.square().sum(-1)
            - 2 * (active_NH * shared_NH).sum(0) * (down_HI * shared_HI).sum(-1)
        )
        found.append(error_H if routed else error_H / max(len(w_N), 1))
    return torch.stack(found).clamp_min(0)


def _with_residuals(stacks: Stacks, shared: Stacks, errors_EH: Tensor, budget: int) -> Compressed:
    experts, neurons, hidden = stacks[0].shape
    errors_EH = errors_EH.scatter(1, errors_EH.topk(min(_LEAST, neurons)).indices, torch.inf)
    (kept,) = largest([errors_EH.flatten()], budget // (3 * hidden) - neurons)
    shared_EH = torch.ones(experts, neurons, dtype=torch.bool)
    shared_EH.view(-1)[kept] = False
    used_H = shared_EH.any(0)
    parts = [stack[~shared_EH] for stack in stacks] + [stack[used_H] for stack in shared]
    found = triple(
        torch.where(shared_EH[..., None], common, stack)
        for common, stack in zip(shared, stacks, strict=True)
    )
    return Compressed(found, tuple(parts), shared_EH=shared_EH)

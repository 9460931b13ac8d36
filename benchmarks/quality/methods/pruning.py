"""What is left out whole: experts by router-weighted norms, intermediate neurons by energy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.quality.budget import equal_sizes, largest
from benchmarks.quality.layer import Compressed, Layer, best_of, dense, layer_by_layer, triple


def reap(layers: Sequence[Layer], keep: float) -> list[Compressed]:
    """REAP (ICLR 2026): experts with the least router-weighted activation norm are removed.

    S_e = mean over the tokens of e of w ‖f_e(x)‖₂, with the top-k weights made to sum to 1 as in
    its code since March 2026. The router loses their rows, so that it chooses among what is left
    and weighs as the family does. Equally many experts in every layer; what rounding leaves goes,
    an expert a layer, to the layers with the largest next saliency relative to their own mean.
    """
    if keep >= 1:
        return [dense(layer) for layer in layers]
    orders = [_expert_saliency(layer).sort(descending=True) for layer in layers]
    gains = [values / values.mean() for values, _ in orders]
    experts = layers[0].shape[0]
    cost = layers[0].dense // experts
    counts = equal_sizes(int(keep * sum(layer.dense for layer in layers)), cost, gains)
    return [
        _keep_experts(layer, order.indices[:count])
        for layer, order, count in zip(layers, orders, counts, strict=True)
    ]


def _expert_saliency(layer: Layer) -> Tensor:
    weights_Tk = layer.weights_Tk / layer.weights_Tk.sum(-1, keepdim=True)
    saliency = torch.zeros(layer.shape[0])
    for expert in range(len(saliency)):
        chosen_Tk = layer.experts_Tk == expert
        norms_N = (layer.activations(expert) @ layer.stacks[2][expert]).norm(dim=-1)
        if len(norms_N):
            saliency[expert] = (weights_Tk[chosen_Tk] * norms_N).mean()
    return saliency


def _keep_experts(layer: Layer, chosen: Tensor) -> Compressed:
    kept = sorted(chosen.tolist())
    mask_E11 = torch.zeros(layer.shape[0], 1, 1)
    mask_E11[kept] = 1
    parts = tuple(stack[kept] for stack in layer.stacks)
    return Compressed(triple(stack * mask_E11 for stack in layer.stacks), parts, tuple(kept))


@layer_by_layer
def neurons(layer: Layer, keep: float) -> Compressed:
    """Neuron pruning by energy (CAMERA-P, AAAI 2026; in the style of TENP).

    A neuron's importance is ‖d‖² ((1 − α) Σ_t (w a)² + α max_t (w a)²), with a its activation, w
    the routing weight and d its row of down. Tuned: α of 0 or 1; the least important of a whole
    layer, as in the paper, or of every expert.
    """
    return best_of(layer, (narrowed(layer, chosen) for chosen in _by_energy(layer, keep)))


@layer_by_layer
def compensated_neurons(layer: Layer, keep: float) -> Compressed:
    """Neuron pruning with least-squares compensation in down (Nyström; MoDeGPT, ICLR 2025).

    With C = Σ_t w² a aᵀ and S the kept neurons, down becomes (C_SS + λI)⁻¹ C_S: D, which makes
    Σ_t w² ‖aᵀD − a_Sᵀ D'‖² least. Tuned: neurons by energy as above, or by the ridge leverage
    scores of MoDeGPT, diag(C (C + λI)⁻¹).
    """

    def candidates() -> Iterator[Compressed]:
        moments_EHH = layer.activation_moments(weighted=True)
        ridge_EHH = _ridge(moments_EHH, 1e-2)
        leverage_EH = (moments_EHH @ torch.linalg.inv(moments_EHH + ridge_EHH)).diagonal(0, 1, 2)
        for chosen in (*_by_energy(layer, keep), *_both_ways(layer, leverage_EH, keep)):
            yield narrowed(layer, chosen, moments_EHH)

    return best_of(layer, candidates())


@layer_by_layer
def eliminated_neurons(layer: Layer, keep: float) -> Compressed:
    """Neuron pruning by backward elimination with compensation (ZipLM, NeurIPS 2023; SlimGPT).

    The optimal brain surgeon for columns: with C⁻¹ kept up to date, removing neuron j and refitting
    down costs ‖d_j‖² / [C⁻¹]_jj, where d_j is its row of the refitted down; the cheapest goes
    first. Tuned: as many neurons of every expert, or the cheapest of the layer by the same cost.
    """
    moments_EHH = layer.activation_moments(weighted=True)
    costs_EH = torch.stack(
        [_elimination_costs(m, d) for m, d in zip(moments_EHH, layer.stacks[2], strict=True)]
    )
    return best_of(
        layer, (narrowed(layer, s, moments_EHH) for s in _both_ways(layer, costs_EH, keep))
    )


@layer_by_layer
def equally_eliminated_neurons(layer: Layer, keep: float) -> Compressed:
    """The same with equally many neurons of every expert and a multiple of 8, for stock engines."""
    moments_EHH = layer.activation_moments(weighted=True)
    width = max(8, int(keep * layer.shape[1]) // 8 * 8)
    orders = [
        _elimination_costs(m, d).argsort(descending=True)
        for m, d in zip(moments_EHH, layer.stacks[2], strict=True)
    ]
    return narrowed(layer, [order[:width].sort().values for order in orders], moments_EHH)


def heapr(layers: Sequence[Layer], keep: float) -> list[Compressed]:
    """HEAPr (arXiv 2509.22299): neurons ranked over the whole model by second-order information.

    A neuron's output is e = w a d, and removing it changes the loss by ½ E[eᵀ G e] with G the mean
    outer product of the loss's gradients by the layer's output on the expert's tokens:
    s = ½ dᵀ G d Σ_t (w a)². The lowest go, whatever their layer. Nothing is compensated.
    """
    if keep >= 1:
        return [dense(layer) for layer in layers]
    scores = []
    for layer in layers:
        if layer.sensitivity is None:
            raise ValueError("HEAPr needs layers that were collected with sensitivity=True")
        down_EHI = layer.stacks[2]
        slope_EH = ((down_EHI @ layer.sensitivity.output_EII) * down_EHI).sum(-1)
        scores.append((slope_EH * _energies(layer, _total)).flatten())
    kept = int(keep * sum(layer.dense for layer in layers)) // (3 * layers[0].shape[2])
    chosen = largest(scores, kept)
    return [
        narrowed(layer, _per_expert(layer, of)) for layer, of in zip(layers, chosen, strict=True)
    ]


def _total(active_NH: Tensor) -> Tensor:
    return active_NH.square().sum(0)


def _largest(active_NH: Tensor) -> Tensor:
    return active_NH.square().amax(0) if len(active_NH) else active_NH.new_zeros(active_NH.shape[1])


def _energies(layer: Layer, over_tokens: Callable[[Tensor], Tensor]) -> Tensor:
    """Of every neuron its squared routing-weighted activations, summed or at most, (E, H)."""
    return torch.stack(
        [
            over_tokens(layer.activations(expert) * w_N[:, None])
            for expert, (_, w_N) in enumerate(layer.tokens)
        ]
    )


def _by_energy(layer: Layer, keep: float) -> Iterator[list[Tensor]]:
    base_EH = layer.stacks[2].square().sum(-1)
    for over_tokens in (_total, _largest):
        yield from _both_ways(layer, base_EH * _energies(layer, over_tokens), keep)


def _both_ways(layer: Layer, scores_EH: Tensor, keep: float) -> Iterator[list[Tensor]]:
    """Neurons of every expert to keep: the best of the layer, and the best of every expert."""
    _, _, hidden = layer.shape
    budget = int(keep * layer.dense)
    yield _per_expert(layer, largest([scores_EH.flatten()], budget // (3 * hidden))[0])
    orders = [scores_H.sort(descending=True) for scores_H in scores_EH]
    widths = equal_sizes(budget, 3 * hidden, [order.values for order in orders])
    yield [order.indices[:width].sort().values for order, width in zip(orders, widths, strict=True)]


def _per_expert(layer: Layer, chosen: Tensor) -> list[Tensor]:
    experts, intermediate, _ = layer.shape
    return [chosen[chosen // intermediate == e] % intermediate for e in range(experts)]


def narrowed(layer: Layer, chosen: list[Tensor], moments_EHH: Tensor | None = None) -> Compressed:
    """Keep some neurons of every expert; refit down where activation moments are given."""
    stacks = [torch.zeros_like(stack) for stack in layer.stacks]
    parts: list[Tensor] = []
    for expert, rows in enumerate(chosen):
        gate_SI, up_SI, down_SI = (stack[expert, rows] for stack in layer.stacks)
        if moments_EHH is not None:
            down_SI = _refitted(moments_EHH[expert], layer.stacks[2][expert], rows)
        parts += [gate_SI, up_SI, down_SI]
        for stack, part_SI in zip(stacks, (gate_SI, up_SI, down_SI), strict=True):
            stack[expert, rows] = part_SI
    return Compressed(triple(stacks), tuple(parts))


def _refitted(moment_HH: Tensor, down_HI: Tensor, rows: Tensor) -> Tensor:
    """Rows of down that make up best for the neurons that are gone, (S, I)."""
    if len(rows) == 0:
        return down_HI[rows]
    kept_SS = moment_HH[rows][:, rows]
    target_SI = moment_HH[rows] @ down_HI.double()
    ridge_SS = _ridge(kept_SS[None], 1e-6)[0]
    # The ridge draws towards the rows as they were, so that full width gives them back.
    target_SI += ridge_SS @ down_HI[rows].double()
    solved_SI: Tensor = torch.linalg.solve(kept_SS + ridge_SS, target_SI)
    return solved_SI.to(down_HI.dtype)


def _ridge(moments_ENN: Tensor, share: float) -> Tensor:
    """Multiples of the identity, a share of the mean diagonal each, (E, N, N)."""
    mean_E11 = moments_ENN.diagonal(0, 1, 2).mean(-1).clamp_min(1e-30)[:, None, None]
    return share * mean_E11 * torch.eye(moments_ENN.shape[-1], dtype=moments_ENN.dtype)


def _elimination_costs(moment_HH: Tensor, down_HI: Tensor) -> Tensor:
    """What removing each neuron costs when the cheapest always goes first, (H,).

    The costs rise in the order in which they go, so that the same order can be read from them.
    """
    moment_HH = moment_HH + _ridge(moment_HH[None], 1e-6)[0]
    inverse_HH = torch.linalg.inv(moment_HH)
    rows_HI = down_HI.double().clone()
    costs_H = torch.zeros(len(rows_HI), dtype=torch.float64)
    gone_H = torch.zeros(len(rows_HI), dtype=torch.bool)
    cost = 0.0
    for _ in range(len(rows_HI)):
        loss_H = rows_HI.square().sum(-1) / inverse_HH.diagonal()
        neuron = int(loss_H.masked_fill(gone_H, torch.inf).argmin())
        cost = max(cost * (1 + 1e-9), float(loss_H[neuron]))
        costs_H[neuron] = cost
        gone_H[neuron] = True
        column_H = inverse_HH[:, neuron] / inverse_HH[neuron, neuron]
        rows_HI -= column_H[:, None] * rows_HI[neuron]
        inverse_HH -= column_H[:, None] * inverse_HH[neuron]
        inverse_HH[neuron, neuron] = 1.0  # never read again; keeps the division finite
    return costs_H

"""Neuron selection: which intermediate neurons experts keep, and how down compensates the rest.

Neurons are eliminated greedily, the cheapest first. Removing neuron j from h, with least-squares
compensation by the remaining ones, adds ‖d_j‖² / (Σ^{-1})_jj to the squared error of the output,
where Σ is the routing-weighted second moment of h and d_j the (compensated) row of down.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from tuckerize.domain import StackShape
from tuckerize.linalg.gram import gram
from tuckerize.linalg.sharing import ALONE, Sharing
from tuckerize.linalg.tucker import in_float64

# Ridge of a moment, relative to the mean of its diagonal. Without it, neurons that too few tokens
# tell apart would seem to replace each other exactly.
_RIDGE = 1e-4
# Ridge of the refit of down, in the same unit.
_REFIT_RIDGE = 1e-3
# Ridges, each ten times the one before, that are tried.
_RIDGES = 8
# Maximum number of elimination rounds; each removes the cheapest few neurons at once.
_MAX_ROUNDS = 256
# Rounds between updates of all that remains, which are GEMMs of this many rounds' neurons.
_ROUNDS_PER_BLOCK = 16
CHUNK_VALUES = 2**23
"""Values of the matrices of the experts that are treated at once (64 MiB in float64)."""

# Minimum width of an expert relative to the mean: calibration text may under-use it.
_MIN_RELATIVE_WIDTH = 0.25


class KeptNeurons(NamedTuple):
    """Neurons that each expert of a group keeps.

    Attributes:
        places_EK: Neuron indices per expert, shape (E, K), K the largest width: the kept ones
            first, ascending, then pruned ones as padding, whose rows are zero in stacks of width K.
        widths: Number of kept neurons per expert.
    """

    places_EK: Tensor
    widths: tuple[int, ...]

    @property
    def width(self) -> int:
        """The largest width."""
        return self.places_EK.shape[1]

    def of_expert(self, expert: int) -> Tensor:
        """Neuron indices that one expert keeps, ascending, shape (K_e,)."""
        return self.places_EK[expert, : self.widths[expert]]

    def mask(self, neurons: int) -> Tensor:
        """Mask of the kept ones among all H neurons, shape (E, H)."""
        kept_EH = torch.zeros((len(self.widths), neurons), dtype=torch.bool)
        for expert in range(len(self.widths)):
            kept_EH[expert, self.of_expert(expert)] = True
        return kept_EH

    def rows(self, stack_EHI: Tensor) -> Tensor:
        """Kept rows of each expert, zero-padded to the largest width, shape (E, K, I)."""
        kept = [
            matrix_HI[self.of_expert(expert).to(matrix_HI.device)]
            for expert, matrix_HI in enumerate(stack_EHI)
        ]
        return widened(pad_sequence(kept, batch_first=True), self.width)

    def of_experts(self, own: slice) -> KeptNeurons:
        """The same of some experts, as wide as the widest of all."""
        return KeptNeurons(self.places_EK[own], self.widths[own])


def widened(rows_EKX: Tensor, width: int) -> Tensor:
    """Rows of experts, with zeros up to the width of the widest, which may be elsewhere."""
    missing = width - rows_EKX.shape[1]
    if not missing:
        return rows_EKX
    return functional.pad(rows_EKX, (0, 0) * (rows_EKX.ndim - 2) + (0, missing))


def kept_neurons(kept_EH: Tensor) -> KeptNeurons:
    """Kept neurons from a mask of shape (E, H)."""
    widths = tuple(int(width) for width in kept_EH.sum(1))
    order_EH = torch.argsort(~kept_EH, dim=1, stable=True)
    return KeptNeurons(order_EH[:, : max(widths)].contiguous(), widths)


def all_neurons(shape: StackShape) -> KeptNeurons:
    """All neurons of all experts."""
    places_EH = torch.arange(shape.intermediate).expand(shape.experts, -1)
    return KeptNeurons(places_EH, (shape.intermediate,) * shape.experts)


@dataclass(frozen=True, slots=True)
class Elimination:
    """Elimination order of each expert's neurons, and their costs.

    Attributes:
        order_EH: Neuron indices per expert in elimination order, shape (E, H).
        costs_EH: Increase of the squared output error at each elimination, shape (E, H), in the
            unit of the moments.
    """

    order_EH: Tensor
    costs_EH: Tensor

    def kept(self, width: int, *, multiple: int = 1, equal: bool = False) -> KeptNeurons:
        """Neurons kept at a mean width of `width` per expert.

        Each expert has its own width: experts whose neurons cost more keep more.

        Args:
            width: Mean width; `multiple` divides the sum of all widths.
            multiple: Alignment of every width.
            equal: Whether all experts get the same width.
        """
        experts, neurons = self.order_EH.shape
        if equal:
            gone_EM = self.order_EH[:, : neurons - width]
            kept_EH = torch.ones((experts, neurons), dtype=torch.bool)
            return kept_neurons(kept_EH.scatter_(1, gone_EM, value=False))
        steps = neurons // multiple
        # Neurons go in order, so a prefix costs at least as much as its most expensive neuron.
        worst_EH = self.costs_EH.cummax(1).values.flip(1)[:, : steps * multiple]
        gains_ES = worst_EH.reshape(experts, steps, multiple).sum(2)
        least = max(1, int(_MIN_RELATIVE_WIDTH * width) // multiple)
        gains_ES[:, :least] = torch.inf
        best = gains_ES.flatten().argsort(stable=True, descending=True)
        counts = torch.bincount(best[: experts * width // multiple] // steps, minlength=experts)
        kept_EH = torch.zeros((experts, neurons), dtype=torch.bool)
        last_first_EH = self.order_EH.flip(1)
        for expert, count in enumerate(counts.tolist()):
            kept_EH[expert, last_first_EH[expert, : count * multiple]] = True
        return kept_neurons(kept_EH)

    @property
    def errors_H(self) -> Tensor:  # noqa: N802
        """Squared output error at mean widths H, H-1, ..., 0, shape (H + 1,); non-decreasing."""
        experts = len(self.order_EH)
        cheapest_first = self.costs_EH.cummax(1).values.flatten().argsort(stable=True)
        total = self.costs_EH.flatten()[cheapest_first].cumsum(0)
        return torch.cat([total.new_zeros(1), total[experts - 1 :: experts]])

    @property
    def equal_errors_H(self) -> Tensor:  # noqa: N802
        """The same for experts of equal width."""
        total = self.costs_EH.sum(0).cumsum(0)
        return torch.cat([total.new_zeros(1), total])


class Eliminator:
    """Orders the neurons of each expert by the output error of removing them.

    Experts come one by one, and are treated some at once.

    Args:
        neurons: Neurons of an expert.

    Source:
        The optimal brain surgeon (Hassibi & Stork 1993) for whole columns, as Kurtic et al. 2023
        (ZipLM).
    """

    def __init__(self, neurons: int) -> None:
        self._neurons = neurons
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._found: list[tuple[Tensor, Tensor]] = []

    def add(self, moment_HH: Tensor, down_HI: Tensor) -> float:
        """Take the next expert.

        Args:
            moment_HH: Routing-weighted second moment of its neurons, shape (H, H).
            down_HI: Its down_proj in stack orientation, shape (H, I).

        Returns:
            The squared norm of its outputs, in the unit of the moment.
        """
        gram_HH = gram(down_HI.T)
        self._waiting.append((moment_HH, gram_HH))
        if len(self._waiting) == max(1, CHUNK_VALUES // len(moment_HH) ** 2):
            self._eliminate()
        return float((moment_HH * gram_HH).sum())

    def of_all(self, sharing: Sharing = ALONE) -> Elimination:
        """The order of all neurons of all experts, those of other processes with them."""
        if self._waiting:
            self._eliminate()
        none_EH = torch.empty(0, self._neurons)
        found = [(none_EH.long(), none_EH.double()), *self._found]
        own = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Elimination(*map(sharing.gather, own))

    def _eliminate(self) -> None:
        moments, grams = map(torch.stack, zip(*self._waiting, strict=True))
        self._waiting = []
        self._found.append(_eliminate_of_experts(moments, grams))


def _eliminate_of_experts(moments_EHH: Tensor, grams_EHH: Tensor) -> tuple[Tensor, Tensor]:
    """Elimination order of the neurons of some experts at once, and their costs."""
    neurons = moments_EHH.shape[1]
    state = _Remaining.of(moments_EHH, grams_EHH)
    orders: list[Tensor] = []
    costs: list[Tensor] = []
    count = -(-neurons // _MAX_ROUNDS)
    for first in range(0, neurons, count * _ROUNDS_PER_BLOCK):
        block = min(count * _ROUNDS_PER_BLOCK, neurons - first)
        order_EM, cost_EM, state = state.eliminate(block, count)
        orders.append(order_EM)
        costs.append(cost_EM)
    return torch.cat(orders, dim=1).cpu(), torch.cat(costs, dim=1).cpu()


class _Remaining(NamedTuple):
    """Remaining neurons of some experts, in float64.

    Attributes:
        places_EN: Their indices, shape (E, N).
        inverse_ENN: Inverse of their second moment, shape (E, N, N).
        gram_ENN: Products of their compensated rows of down, shape (E, N, N).
    """

    places_EN: Tensor
    inverse_ENN: Tensor
    gram_ENN: Tensor

    @classmethod
    def of(cls, moments_EHH: Tensor, grams_EHH: Tensor) -> Self:
        """All neurons."""
        exact_EHH = in_float64(moments_EHH)
        mean_E = exact_EHH.diagonal(dim1=1, dim2=2).mean(1)
        ridge_E = torch.where(mean_E > 0, _RIDGE * mean_E, torch.ones_like(mean_E))
        # Symmetric, and LAPACK's matrices are transposed: rows that are read are contiguous here.
        inverse_EHH = torch.cholesky_inverse(_root(exact_EHH, ridge_E)).mT.contiguous()
        places_H = torch.arange(exact_EHH.shape[1], device=exact_EHH.device)
        return cls(places_H.expand(len(exact_EHH), -1), inverse_EHH, in_float64(grams_EHH))

    def eliminate(self, block: int, count: int) -> tuple[Tensor, Tensor, Self]:
        """Eliminate a block of neurons of every expert, in rounds of `count`.

        The matrices are updated at its end only; a round reads its own rows of them, less what
        the rounds before it in the block have changed: VᵀV of the inverse, KᵀL + LᵀK of the Gram
        matrix, whose rows are those of the rounds.

        Returns:
            Order and costs, each of shape (E, block), and what remains.
        """
        inverse_ENN, gram_ENN = self.inverse_ENN, self.gram_ENN
        experts, left, _ = inverse_ENN.shape
        lows = inverse_ENN.new_zeros(3, experts, block, left)
        diagonal_EN = inverse_ENN.diagonal(dim1=1, dim2=2).clone()
        norms_EN = gram_ENN.diagonal(dim1=1, dim2=2).clone()
        gone_EN = torch.zeros_like(norms_EN, dtype=torch.bool)
        picked, costs = [], []
        tiny = torch.finfo(diagonal_EN.dtype).tiny
        for first in range(0, block, count):
            costs_EN = norms_EN.clamp_min(0) / diagonal_EN.clamp_min(tiny)
            costs_EN.masked_fill_(gone_EN, torch.inf)
            take = min(count, block - first)
            picked_EM = costs_EN.topk(take, largest=False, sorted=True).indices
            V_EBN, K_EBN, L_EBN = lows[:, :, :first]
            V_EMB, K_EMB, L_EMB = (
                _columns(low_EBN, picked_EM).mT for low_EBN in lows[:, :, :first]
            )
            # Both matrices are symmetric: their rows are their columns.
            inverse_EMN = _rows(inverse_ENN, picked_EM).baddbmm_(V_EMB, V_EBN, alpha=-1)
            gram_EMN = _rows(gram_ENN, picked_EM)
            gram_EMN.baddbmm_(K_EMB, L_EBN, alpha=-1).baddbmm_(L_EMB, K_EBN, alpha=-1)
            inverse_EMM = _columns(inverse_EMN, picked_EM)
            gram_EMM = _columns(gram_EMN, picked_EM)
            root_EMM = torch.linalg.cholesky_ex(inverse_EMM).L
            V_EMN = torch.linalg.solve_triangular(root_EMM, inverse_EMN, upper=False)
            K_EMN = torch.linalg.solve_triangular(root_EMM.mT, V_EMN, upper=True)
            L_EMN = gram_EMN - gram_EMM @ K_EMN / 2
            for low_EBN, own_EMN in zip(lows, (V_EMN, K_EMN, L_EMN), strict=True):
                low_EBN[:, first : first + take] = own_EMN
            diagonal_EN -= V_EMN.square().sum(1)
            norms_EN -= 2 * (K_EMN * L_EMN).sum(1)
            gone_EN.scatter_(1, picked_EM, value=True)
            solved_EMM = torch.cholesky_solve(gram_EMM, root_EMM)
            lost_E1 = solved_EMM.diagonal(dim1=1, dim2=2).sum(1, keepdim=True).clamp_min(0)
            picked.append(picked_EM)
            # The cost of a round is divided evenly among its neurons.
            costs.append((lost_E1 / take).expand(-1, take))
        order_EM = torch.cat(picked, dim=1)
        kept_EN = gone_EN.byte().argsort(dim=1, stable=True)[:, : left - block]
        V_EBN, K_EBN, L_EBN = (_columns(low_EBN, kept_EN) for low_EBN in lows)
        inverse_ENN = _columns(_rows(inverse_ENN, kept_EN), kept_EN)
        inverse_ENN.baddbmm_(V_EBN.mT, V_EBN, alpha=-1)
        gram_ENN = _columns(_rows(gram_ENN, kept_EN), kept_EN)
        gram_ENN.baddbmm_(K_EBN.mT, L_EBN, alpha=-1).baddbmm_(L_EBN.mT, K_EBN, alpha=-1)
        remaining = type(self)(self.places_EN.gather(1, kept_EN), inverse_ENN, gram_ENN)
        return self.places_EN.gather(1, order_EM), torch.cat(costs, dim=1), remaining


def _root(moments_ENN: Tensor, ridge_E: Tensor) -> Tensor:
    """Cholesky factors of moments plus a ridge, raised where rounding made them indefinite."""
    root_ENN = moments_ENN
    for _ in range(_RIDGES):
        ridges_EN = ridge_E[:, None].expand(moments_ENN.shape[:2])
        found = torch.linalg.cholesky_ex(moments_ENN + torch.diag_embed(ridges_EN))
        root_ENN = found.L
        if not bool(found.info.any()):
            break
        ridge_E = torch.where(found.info > 0, 10 * ridge_E, ridge_E)
    return root_ENN


def _rows(matrices_ENX: Tensor, places_EM: Tensor) -> Tensor:
    """Rows at each expert's own places, shape (E, M, X)."""
    experts, size, width = matrices_ENX.shape
    firsts_E1 = size * torch.arange(experts, device=places_EM.device)[:, None]
    rows_FX = matrices_ENX.flatten(0, 1).index_select(0, (places_EM + firsts_E1).flatten())
    return rows_FX.view(*places_EM.shape, width)


def _columns(matrices_EXN: Tensor, places_EM: Tensor) -> Tensor:
    """Columns at each expert's own places, shape (E, X, M)."""
    return matrices_EXN.gather(2, places_EM[:, None].expand(-1, matrices_EXN.shape[1], -1))


def refit_down(
    moments: Iterable[tuple[Tensor, Tensor]], down_EHI: Tensor, kept: KeptNeurons
) -> Tensor:
    """Refit down_proj on the kept neurons to the original outputs, shape (E, K, I).

    Least squares with a ridge towards the kept rows of down; narrower experts are zero-padded.

    Args:
        moments: Of one expert after another, the second moment of the compressed neurons (K, K),
            and their cross moment with the original neurons (K, H).
        down_EHI: Original down_proj in stack orientation, shape (E, H, I).
        kept: The kept neurons.
    """
    result_EKI = down_EHI.new_zeros(len(down_EHI), kept.width, down_EHI.shape[2])
    for expert, ((moment_KK, cross_KH), down_HI, width) in enumerate(
        zip(moments, down_EHI, kept.widths, strict=True)
    ):
        exact_KK = in_float64(moment_KK[:width, :width])
        ridge = _REFIT_RIDGE * exact_KK.diagonal().mean().clamp_min(1e-30)
        root_KK = _root(exact_KK[None], ridge[None])[0]
        kept_KI = in_float64(down_HI[kept.of_expert(expert).to(down_HI.device)])
        # The ridge bounds what the rounding of this product can do to the outputs.
        right_KI = in_float64(cross_KH[:width] @ down_HI) + ridge * kept_KI
        result_EKI[expert, :width] = torch.cholesky_solve(right_KI, root_KK).to(down_EHI)
    return result_EKI


def refitted_energy(moment_HH: Tensor, outputs_HC: Tensor, down_HC: Tensor) -> float:
    """Squared norm of the outputs that the refit of one expert's down_proj recovers.

    The squared error of the refit is that of the original outputs, less this. All neurons are kept;
    see `refit_down`. Columns of down are fitted each by itself: they may be some of them.

    Args:
        moment_HH: Second moment of the compressed neurons, shape (H, H).
        outputs_HC: Their cross moment with the original outputs, shape (H, C).
        down_HC: Original down_proj in stack orientation, shape (H, C).
    """
    exact_HH, kept_HC = in_float64(moment_HH), in_float64(down_HC)
    ridge = _REFIT_RIDGE * exact_HH.diagonal().mean().clamp_min(1e-30)
    root_HH = _root(exact_HH[None], ridge[None])[0]
    right_HC = in_float64(outputs_HC) + ridge * kept_HC
    fitted_HC = torch.cholesky_solve(right_HC, root_HH)
    # Of M the moment and F the fit: 2 tr FᵀO − tr FᵀMF, where (M + ridge) F are the right sides.
    recovered = (fitted_HC * (right_HC + ridge * (fitted_HC - 2 * kept_HC))).sum()
    return float(recovered)

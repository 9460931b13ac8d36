"""Neuron selection: which intermediate neurons experts keep, and how down compensates the rest.

Neurons are eliminated greedily, the cheapest first. Removing neuron j from h, with least-squares
compensation by the remaining ones, adds ‖d_j‖² / (Σ^{-1})_jj to the squared error of the output,
where Σ is the routing-weighted second moment of h and d_j the (compensated) row of down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tuckerize.domain import StackShape
from tuckerize.linalg.tucker import in_float64

# Ridge of a moment, relative to the mean of its diagonal. Without it, neurons that too few tokens
# tell apart would seem to replace each other exactly.
_RIDGE = 1e-4
# Ridge of the refit of down, in the same unit.
_REFIT_RIDGE = 1e-3
# Maximum number of elimination rounds; each removes the cheapest few neurons at once.
_MAX_ROUNDS = 256
# Compact the matrices every 8 rounds; in between, pruned rows are only zeroed.
_COMPACTION_INTERVAL = 8
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
        return pad_sequence(kept, batch_first=True)


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


def eliminate(moments_EHH: Tensor, down_EHI: Tensor) -> Elimination:
    """Order the neurons of each expert by the output error of removing them.

    Args:
        moments_EHH: Routing-weighted second moment of each expert's neurons, shape (E, H, H).
        down_EHI: down_proj of each expert in stack orientation, shape (E, H, I).

    Source:
        The optimal brain surgeon (Hassibi & Stork 1993) for whole columns, as Kurtic et al. 2023
        (ZipLM).
    """
    # One expert at a time: its two matrices alone are updated, thousands of times.
    results = [
        _eliminate_of_expert(moment_HH, down_HI)
        for moment_HH, down_HI in zip(moments_EHH, down_EHI, strict=True)
    ]
    return Elimination(*(torch.stack(parts) for parts in zip(*results, strict=True)))


def _eliminate_of_expert(moment_HH: Tensor, down_HI: Tensor) -> tuple[Tensor, Tensor]:
    """Elimination order of one expert's neurons, and their costs."""
    inverse_HH = _inverse(in_float64(moment_HH))
    down_HI = in_float64(down_HI).clone()
    neurons = len(down_HI)
    left_H = torch.arange(neurons, device=down_HI.device)
    gone_H = torch.zeros_like(left_H, dtype=torch.bool)
    order: list[Tensor] = []
    costs: list[Tensor] = []
    count = -(-neurons // _MAX_ROUNDS)
    for first in range(0, neurons, count):
        if first % (count * _COMPACTION_INTERVAL) == 0:
            inverse_HH, down_HI = inverse_HH[~gone_H][:, ~gone_H], down_HI[~gone_H]
            left_H, gone_H = left_H[~gone_H], gone_H[~gone_H]
        take = min(count, neurons - first)
        diagonal_H = inverse_HH.diagonal().clamp_min(torch.finfo(inverse_HH.dtype).tiny)
        costs_H = torch.linalg.vector_norm(down_HI, dim=1).square() / diagonal_H
        costs_H.masked_fill_(gone_H, torch.inf)
        cheapest_M = costs_H.topk(take, largest=False, sorted=True).indices
        lost = _remove(inverse_HH, down_HI, cheapest_M)
        gone_H[cheapest_M] = True
        order.append(left_H[cheapest_M])
        # The cost of a round is divided evenly among its neurons.
        costs.append((lost / take).expand(take))
    return torch.cat(order).cpu(), torch.cat(costs).cpu()


def refit_down(
    kept_moments_EKK: Tensor, cross_moments_EKH: Tensor, down_EHI: Tensor, kept: KeptNeurons
) -> Tensor:
    """Refit down_proj on the kept neurons to the original outputs, shape (E, K, I).

    Least squares with a ridge towards the kept rows of down; narrower experts are zero-padded.

    Args:
        kept_moments_EKK: Second moment of the compressed neurons, shape (E, K, K).
        cross_moments_EKH: Their cross moment with the original neurons, shape (E, K, H).
        down_EHI: Original down_proj in stack orientation, shape (E, H, I).
        kept: The kept neurons.
    """
    result = []
    for expert, (moment_KK, cross_KH, down_HI, width) in enumerate(
        zip(kept_moments_EKK, cross_moments_EKH, down_EHI, kept.widths, strict=True)
    ):
        exact_KK, exact_HI = in_float64(moment_KK[:width, :width]), in_float64(down_HI)
        ridge = _REFIT_RIDGE * max(float(exact_KK.diagonal().mean()), 1e-30)
        identity = torch.eye(width, dtype=exact_KK.dtype, device=exact_KK.device)
        kept_KI = exact_HI[kept.of_expert(expert).to(exact_HI.device)]
        right_KI = in_float64(cross_KH[:width]) @ exact_HI + ridge * kept_KI
        result.append(torch.linalg.solve(exact_KK + ridge * identity, right_KI))
    return pad_sequence(result, batch_first=True).to(down_EHI)


def _inverse(moment_HH: Tensor) -> Tensor:
    """Inverse of a moment plus its ridge."""
    mean = float(moment_HH.diagonal().mean())
    ridge = _RIDGE * mean if mean > 0 else 1.0
    identity = torch.eye(len(moment_HH), dtype=moment_HH.dtype, device=moment_HH.device)
    inverse: Tensor = torch.linalg.inv(moment_HH + ridge * identity)
    return inverse


def _remove(inverse_HH: Tensor, down_HI: Tensor, gone_M: Tensor) -> Tensor:
    """Remove neurons of one expert and compensate in place; returns the squared error."""
    columns_HM = inverse_HH[:, gone_M]
    block_MM, rows_MI = columns_HM[gone_M], down_HI[gone_M]
    solved_MI = torch.linalg.solve(block_MM, rows_MI)
    lost: Tensor = (solved_MI * rows_MI).sum().clamp_min(0)
    down_HI.addmm_(columns_HM, solved_MI, alpha=-1)
    inverse_HH.addmm_(columns_HM, torch.linalg.solve(block_MM, columns_HM.T), alpha=-1)
    # Decouple pruned neurons exactly; rounding errors must not reintroduce them.
    down_HI[gone_M] = 0.0
    inverse_HH[gone_M] = 0.0
    inverse_HH[:, gone_M] = 0.0
    inverse_HH[gone_M, gone_M] = 1.0
    return lost

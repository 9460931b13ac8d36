"""Neuron selection: which intermediate neurons experts keep, and how down does without the rest.

Neurons are eliminated one after another. Removing neuron j from h, with least-squares compensation
by those that are left, adds ‖d_j‖² / (Σ^{-1})_jj to the squared error of the output, where Σ is the
routing-weighted second moment of h and d_j the (compensated) row of down. The cheapest goes first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tuckerize.linalg.tucker import in_float64

# Added to the diagonal of a moment, as a share of its mean: what few tokens do not tell apart must
# not look as if one neuron could replace another exactly.
_RIDGE = 1e-4
# Of the refit of down, in the same unit.
_REFIT_RIDGE = 1e-3
# An elimination is done in this many rounds at most, each removing the cheapest few at once.
_MOST_ROUNDS = 256


@dataclass(frozen=True, slots=True)
class Elimination:
    """In which order the neurons of every expert go, and at what cost.

    Attributes:
        order_EH: Neurons of every expert, the first to go first, shape (E, H).
        errors_H: Squared output error of all experts together after so many removals of each,
            shape (H + 1,), in the unit of the moments; never falling.
    """

    order_EH: Tensor
    errors_H: Tensor

    def kept(self, width: int) -> Tensor:
        """The neurons that are left at a width, ascending, shape (E, width)."""
        first = self.order_EH.shape[1] - width
        return self.order_EH[:, first:].sort(dim=1).values


def eliminate(moments_EHH: Tensor, down_EHI: Tensor) -> Elimination:
    """Order the neurons of every expert by what the output loses without them.

    Args:
        moments_EHH: Routing-weighted second moment of every expert's neurons, shape (E, H, H).
        down_EHI: down_proj of every expert in stack orientation, shape (E, H, I).

    Source:
        The optimal brain surgeon (Hassibi & Stork 1993) for whole columns, as Kurtic et al. 2023
        (ZipLM), with the neurons of all experts eliminated side by side.
    """
    experts, neurons, _ = down_EHI.shape
    inverse_EHH = _inverse(in_float64(moments_EHH))
    down_EHI = in_float64(down_EHI).clone()
    device = down_EHI.device
    gone_EH = torch.zeros((experts, neurons), dtype=torch.bool, device=device)
    order, errors = [], [torch.zeros(1, dtype=torch.float64)]
    count = -(-neurons // _MOST_ROUNDS)
    while len(errors) <= neurons:
        take = min(count, neurons + 1 - len(errors))
        diagonal_EH = inverse_EHH.diagonal(dim1=1, dim2=2).clamp_min(
            torch.finfo(torch.float64).tiny
        )
        costs_EH = down_EHI.square().sum(2) / diagonal_EH
        costs_EH.masked_fill_(gone_EH, torch.inf)
        cheapest_EM = costs_EH.topk(take, dim=1, largest=False, sorted=True).indices
        lost = _remove(inverse_EHH, down_EHI, cheapest_EM)
        gone_EH.scatter_(1, cheapest_EM, value=True)
        order.append(cheapest_EM)
        # Within a round the cost is spread evenly.
        errors += [errors[-1] + lost * (n + 1) / take for n in range(take)]
    return Elimination(torch.cat(order, dim=1).cpu(), torch.cat(errors))


def refit_down(
    kept_moments_EKK: Tensor, cross_moments_EKH: Tensor, down_EHI: Tensor, kept_EK: Tensor
) -> Tensor:
    """down_proj on the kept neurons, fitted to what the experts gave before, shape (E, K, I).

    Least squares with a ridge towards the rows of down that are kept.

    Args:
        kept_moments_EKK: Second moment of the neurons as they are now, shape (E, K, K).
        cross_moments_EKH: Their moment with the neurons as they were, shape (E, K, H).
        down_EHI: down_proj as it was, in stack orientation, shape (E, H, I).
        kept_EK: Indices of the kept neurons, shape (E, K).
    """
    result = []
    for moment_KK, cross_KH, down_HI, kept_K in zip(
        kept_moments_EKK, cross_moments_EKH, down_EHI, kept_EK.to(down_EHI.device), strict=True
    ):
        exact_KK, exact_HI = in_float64(moment_KK), in_float64(down_HI)
        ridge = _REFIT_RIDGE * max(float(exact_KK.diagonal().mean()), 1e-30)
        identity = torch.eye(len(kept_K), dtype=exact_KK.dtype, device=exact_KK.device)
        kept_KI = in_float64(down_HI[kept_K])
        right_KI = in_float64(cross_KH) @ exact_HI + ridge * kept_KI
        result.append(torch.linalg.solve(exact_KK + ridge * identity, right_KI))
    return torch.stack(result).to(down_EHI)


def _inverse(moments_EHH: Tensor) -> Tensor:
    """Inverses of the moments with their ridge."""
    mean_E = moments_EHH.diagonal(dim1=1, dim2=2).mean(1)
    ridge_E = torch.where(mean_E > 0, _RIDGE * mean_E, torch.ones_like(mean_E))
    identity = torch.eye(moments_EHH.shape[1], dtype=moments_EHH.dtype, device=moments_EHH.device)
    inverse: Tensor = torch.linalg.inv(moments_EHH + ridge_E[:, None, None] * identity)
    return inverse


def _remove(inverse_EHH: Tensor, down_EHI: Tensor, gone_EM: Tensor) -> Tensor:
    """Remove neurons of every expert, compensate in place; returns the squared error it costs."""
    hidden, neurons = down_EHI.shape[2], inverse_EHH.shape[1]
    columns_EHM = inverse_EHH.gather(2, gone_EM[:, None, :].expand(-1, neurons, -1))
    block_EMM = columns_EHM.gather(1, gone_EM[:, :, None].expand(-1, -1, gone_EM.shape[1]))
    rows_EMI = down_EHI.gather(1, gone_EM[:, :, None].expand(-1, -1, hidden))
    solved_EMI = torch.linalg.solve(block_EMM, rows_EMI)
    lost: Tensor = (solved_EMI * rows_EMI).sum().double().clamp_min(0).cpu()
    down_EHI -= columns_EHM @ solved_EMI
    inverse_EHH -= columns_EHM @ torch.linalg.solve(block_EMM, columns_EHM.mT)
    # Rounding must not bring a neuron back: it stands alone from now on.
    places = gone_EM[:, :, None]
    down_EHI.scatter_(1, places.expand(-1, -1, hidden), 0.0)
    inverse_EHH.scatter_(1, places.expand(-1, -1, neurons), 0.0)
    inverse_EHH.scatter_(2, gone_EM[:, None, :].expand(-1, neurons, -1), 0.0)
    ones = torch.ones_like(gone_EM, dtype=inverse_EHH.dtype)
    inverse_EHH.diagonal(dim1=1, dim2=2).scatter_(1, gone_EM, ones)
    return lost.reshape(1)

"""Neuron selection: which intermediate neurons experts keep, and how down does without the rest.

Neurons are eliminated one after another. Removing neuron j from h, with least-squares compensation
by those that are left, adds ‖d_j‖² / (Σ^{-1})_jj to the squared error of the output, where Σ is the
routing-weighted second moment of h and d_j the (compensated) row of down. The cheapest goes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tuckerize.domain import StackShape
from tuckerize.linalg.tucker import in_float64

# Added to the diagonal of a moment, as a share of its mean: what few tokens do not tell apart must
# not look as if one neuron could replace another exactly.
_RIDGE = 1e-4
# Of the refit of down, in the same unit.
_REFIT_RIDGE = 1e-3
# An elimination is done in this many rounds at most, each removing the cheapest few at once.
_MOST_ROUNDS = 256
# An expert keeps at least this share of the mean width: another text may ask more of it.
_LEAST_SHARE = 0.25


class KeptNeurons(NamedTuple):
    """Which neurons every expert of a group keeps.

    Attributes:
        places_EK: Neurons of every expert, shape (E, K), K the largest width: the kept ones first,
            ascending, then dropped ones, whose rows are zero where stacks are this wide.
        widths: How many every expert keeps.
    """

    places_EK: Tensor
    widths: tuple[int, ...]

    def of_expert(self, expert: int) -> Tensor:
        """The neurons that one expert keeps, ascending, shape (K_e,)."""
        return self.places_EK[expert, : self.widths[expert]]

    def mask(self, neurons: int) -> Tensor:
        """True where a neuron of all H is kept, shape (E, H)."""
        kept_EH = torch.zeros((len(self.widths), neurons), dtype=torch.bool)
        for expert in range(len(self.widths)):
            kept_EH[expert, self.of_expert(expert)] = True
        return kept_EH

    def rows(self, stack_EHI: Tensor) -> Tensor:
        """The kept rows of every expert, zeros below the narrower ones, shape (E, K, I)."""
        kept = [
            matrix_HI[self.of_expert(expert).to(matrix_HI.device)]
            for expert, matrix_HI in enumerate(stack_EHI)
        ]
        return pad_sequence(kept, batch_first=True)


def kept_neurons(kept_EH: Tensor) -> KeptNeurons:
    """The neurons for which a mask of shape (E, H) is true."""
    widths = tuple(int(width) for width in kept_EH.sum(1))
    order_EH = torch.argsort(~kept_EH, dim=1, stable=True)
    return KeptNeurons(order_EH[:, : max(widths)].contiguous(), widths)


def all_neurons(shape: StackShape) -> KeptNeurons:
    """Every neuron of every expert."""
    places_EH = torch.arange(shape.intermediate).expand(shape.experts, -1)
    return KeptNeurons(places_EH, (shape.intermediate,) * shape.experts)


@dataclass(frozen=True, slots=True)
class Elimination:
    """In which order the neurons of every expert go, and at what cost.

    Attributes:
        order_EH: Neurons of every expert, the first to go first, shape (E, H).
        costs_EH: What the squared output error grows by as each of them goes, shape (E, H), in the
            unit of the moments.
    """

    order_EH: Tensor
    costs_EH: Tensor

    def kept(self, width: int, *, multiple: int = 1, equal: bool = False) -> KeptNeurons:
        """What is left of `width` neurons an expert on average.

        Each expert has its own width: those whose neurons cost more keep more.

        Args:
            width: Mean width; a multiple of `multiple`.
            multiple: Every width is a multiple of this.
            equal: All experts are equally wide.
        """
        experts, neurons = self.order_EH.shape
        if equal:
            gone_EM = self.order_EH[:, : neurons - width]
            kept_EH = torch.ones((experts, neurons), dtype=torch.bool)
            return kept_neurons(kept_EH.scatter_(1, gone_EM, value=False))
        steps = neurons // multiple
        # A neuron cannot go before those that go before it: what is asked is what the worst costs.
        worst_EH = self.costs_EH.cummax(1).values.flip(1)[:, : steps * multiple]
        gains_ES = worst_EH.reshape(experts, steps, multiple).sum(2)
        least = max(1, int(_LEAST_SHARE * width) // multiple)
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
        """Squared output error at mean widths H, H-1, ..., 0, shape (H + 1,); never falling."""
        experts = len(self.order_EH)
        cheapest_first = self.costs_EH.cummax(1).values.flatten().argsort(stable=True)
        total = self.costs_EH.flatten()[cheapest_first].cumsum(0)
        return torch.cat([total.new_zeros(1), total[experts - 1 :: experts]])

    @property
    def equal_errors_H(self) -> Tensor:  # noqa: N802
        """The same with experts that are equally wide."""
        total = self.costs_EH.sum(0).cumsum(0)
        return torch.cat([total.new_zeros(1), total])


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
    order: list[Tensor] = []
    costs: list[Tensor] = []
    count = -(-neurons // _MOST_ROUNDS)
    for first in range(0, neurons, count):
        take = min(count, neurons - first)
        diagonal_EH = inverse_EHH.diagonal(dim1=1, dim2=2).clamp_min(
            torch.finfo(torch.float64).tiny
        )
        costs_EH = down_EHI.square().sum(2) / diagonal_EH
        costs_EH.masked_fill_(gone_EH, torch.inf)
        cheapest_EM = costs_EH.topk(take, dim=1, largest=False, sorted=True).indices
        lost_E = _remove(inverse_EHH, down_EHI, cheapest_EM)
        gone_EH.scatter_(1, cheapest_EM, value=True)
        order.append(cheapest_EM)
        # Within a round the cost is spread evenly.
        costs.append((lost_E / take)[:, None].expand(-1, take))
    return Elimination(torch.cat(order, dim=1).cpu(), torch.cat(costs, dim=1).cpu())


def refit_down(
    kept_moments_EKK: Tensor, cross_moments_EKH: Tensor, down_EHI: Tensor, kept: KeptNeurons
) -> Tensor:
    """down_proj on the kept neurons, fitted to what the experts gave before, shape (E, K, I).

    Least squares with a ridge towards the rows of down that are kept; zeros below narrower experts.

    Args:
        kept_moments_EKK: Second moment of the neurons as they are now, shape (E, K, K).
        cross_moments_EKH: Their moment with the neurons as they were, shape (E, K, H).
        down_EHI: down_proj as it was, in stack orientation, shape (E, H, I).
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


def _inverse(moments_EHH: Tensor) -> Tensor:
    """Inverses of the moments with their ridge."""
    mean_E = moments_EHH.diagonal(dim1=1, dim2=2).mean(1)
    ridge_E = torch.where(mean_E > 0, _RIDGE * mean_E, torch.ones_like(mean_E))
    identity = torch.eye(moments_EHH.shape[1], dtype=moments_EHH.dtype, device=moments_EHH.device)
    inverse: Tensor = torch.linalg.inv(moments_EHH + ridge_E[:, None, None] * identity)
    return inverse


def _remove(inverse_EHH: Tensor, down_EHI: Tensor, gone_EM: Tensor) -> Tensor:
    """Remove neurons of every expert, compensate in place; returns each expert's squared error."""
    hidden, neurons = down_EHI.shape[2], inverse_EHH.shape[1]
    columns_EHM = inverse_EHH.gather(2, gone_EM[:, None, :].expand(-1, neurons, -1))
    block_EMM = columns_EHM.gather(1, gone_EM[:, :, None].expand(-1, -1, gone_EM.shape[1]))
    rows_EMI = down_EHI.gather(1, gone_EM[:, :, None].expand(-1, -1, hidden))
    solved_EMI = torch.linalg.solve(block_EMM, rows_EMI)
    lost_E: Tensor = (solved_EMI * rows_EMI).sum((1, 2)).clamp_min(0)
    down_EHI -= columns_EHM @ solved_EMI
    inverse_EHH -= columns_EHM @ torch.linalg.solve(block_EMM, columns_EHM.mT)
    # Rounding must not bring a neuron back: it stands alone from now on.
    places = gone_EM[:, :, None]
    down_EHI.scatter_(1, places.expand(-1, -1, hidden), 0.0)
    inverse_EHH.scatter_(1, places.expand(-1, -1, neurons), 0.0)
    inverse_EHH.scatter_(2, gone_EM[:, None, :].expand(-1, neurons, -1), 0.0)
    ones = torch.ones_like(gone_EM, dtype=inverse_EHH.dtype)
    inverse_EHH.diagonal(dim1=1, dim2=2).scatter_(1, gone_EM, ones)
    return lost_E

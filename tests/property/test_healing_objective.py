"""The loss of recovery training, against naive float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tuckerize.healing.objective import Losses, Predictions, Windows, losses

VOCABULARY = 12


class Known:
    """A model of fixed logits."""

    def __init__(self, logits_SLV: Tensor) -> None:
        self.logits_SLV = logits_SLV.requires_grad_()

    def logits(self, tokens_SL: Tensor) -> Tensor:
        assert tokens_SL.shape == self.logits_SLV.shape[:2]
        return self.logits_SLV


def both_of(seed: int, size: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    own, known = size * torch.randn(2, 3, 5, VOCABULARY, generator=generator)
    return own, known, torch.randint(VOCABULARY, (3, 5), generator=generator)


def found(own: Tensor, known: Tensor, tokens: Tensor, kept: int, share: float) -> Losses:
    model: Any = Known(own)
    return losses(model, Windows(tokens, Predictions.of_logits(known, kept)), share)


def divergence(own: Tensor, known: Tensor, kept: int) -> float:
    """KL divergence over the likeliest tokens of the known one and all others as one, naively."""
    total = 0.0
    for q, p in zip(
        own[:, :-1].flatten(0, 1).double().softmax(-1).tolist(),
        known[:, :-1].flatten(0, 1).double().softmax(-1).tolist(),
        strict=True,
    ):
        order = sorted(range(VOCABULARY), key=lambda token: -p[token])
        cells = [[token] for token in order[:kept]] + ([order[kept:]] if order[kept:] else [])
        for cell in cells:
            mine, theirs = (sum(x[token] for token in cell) for x in (q, p))
            total += theirs * float(torch.tensor(theirs / mine, dtype=torch.float64).log())
    return total


@given(st.integers(0, 2**20), st.integers(1, VOCABULARY + 3), st.floats(0, 1), st.floats(0.1, 5))
def test_loss_mixes_likelihood_and_divergence(
    seed: int, kept: int, share: float, size: float
) -> None:
    own, known, tokens = both_of(seed, size)
    nats = -own.double().log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None]).sum().item()
    expected = (1 - share) * nats + share * divergence(own, known, kept)
    result = found(own, known, tokens, kept, share)
    assert result.nats.item() == pytest.approx(nats, rel=1e-5)
    assert result.objective.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@given(st.integers(0, 2**20), st.integers(1, VOCABULARY))
def test_fewer_kept_tokens_tell_less_and_a_perfect_student_has_no_gradient(
    seed: int, kept: int
) -> None:
    own, known, tokens = both_of(seed, 3.0)
    less = found(own, known, tokens, kept, 1.0).objective.item()
    more = found(own, known, tokens, kept + 1, 1.0).objective.item()
    assert -1e-4 <= less <= more + 1e-4
    perfect = known.clone()
    found(perfect, known, tokens, kept, 1.0).objective.backward()  # type: ignore[no-untyped-call]
    assert perfect.grad is not None
    assert perfect.grad.abs().max() < 1e-5

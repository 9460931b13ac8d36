"""Dense experts against a loop over tokens in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from tests.expert_cases import SWIGLU
from tuckerize.runtime.dense import ExpertWeights, dense_output

EXPERTS, INTERMEDIATE, HIDDEN = 5, 6, 4


def expert(number: int) -> ExpertWeights:
    generator = torch.Generator().manual_seed(number)
    gate_HI, up_HI = torch.randn(2, INTERMEDIATE, HIDDEN, generator=generator)
    return ExpertWeights(gate_HI, up_HI, torch.randn(HIDDEN, INTERMEDIATE, generator=generator))


@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("top_k", [1, 3])
def test_output_is_the_weighted_sum_over_the_experts_of_a_token(tokens: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(9)
    x_TI = torch.randn(tokens, HIDDEN, generator=generator)
    scores_TE = torch.rand(tokens, EXPERTS, generator=generator)
    scores_TE[:, 2] = 0  # an expert without tokens
    weights_Tk, experts_Tk = scores_TE.topk(top_k)
    read: list[int] = []

    def weights(number: int) -> ExpertWeights:
        read.append(number)
        return expert(number)

    found_TI = dense_output(x_TI, experts_Tk, weights_Tk, expert_weights=weights, activation=SWIGLU)
    expected_TI = torch.zeros(tokens, HIDDEN, dtype=torch.float64)
    for token in range(tokens):
        for number, weight in zip(experts_Tk[token], weights_Tk[token], strict=True):
            gate_HI, up_HI, down_IH = (matrix.double() for matrix in expert(int(number)))
            x_I = x_TI[token].double()
            neurons_H = silu(gate_HI @ x_I) * (up_HI @ x_I)
            expected_TI[token] += weight.double() * (down_IH @ neurons_H)
    assert found_TI.dtype == torch.float32
    torch.testing.assert_close(found_TI.double(), expected_TI, rtol=1e-5, atol=1e-5)
    assert sorted(read) == sorted(set(experts_Tk.flatten().tolist()))

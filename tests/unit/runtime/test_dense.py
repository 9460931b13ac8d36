from __future__ import annotations

import torch

from tuckerize.runtime.dense import ExpertWeights, dense_output


def test_dense_output_is_the_weighted_sum_of_the_experts_of_each_token() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    gate_EHI, up_EHI, down_EIH = random(4, 5, 3), random(4, 5, 3), random(4, 3, 5)
    x_TI, weights_Tk = random(6, 3), random(6, 2)
    experts_Tk = torch.tensor([[0, 1], [1, 0], [3, 1], [0, 3], [3, 3], [1, 0]])
    read: list[int] = []

    def expert_weights(expert: int) -> ExpertWeights:
        read.append(expert)
        return ExpertWeights(gate_EHI[expert], up_EHI[expert], down_EIH[expert])

    found_TI = dense_output(
        x_TI, experts_Tk, weights_Tk, expert_weights=expert_weights, activation=torch.tanh
    )
    neurons_TEH = torch.tanh(torch.einsum("ti,ehi->teh", x_TI, gate_EHI))
    neurons_TEH = neurons_TEH * torch.einsum("ti,ehi->teh", x_TI, up_EHI)
    all_TEI = torch.einsum("teh,eih->tei", neurons_TEH, down_EIH)
    shares_TE = torch.zeros(6, 4, dtype=torch.float64).scatter_add_(1, experts_Tk, weights_Tk)
    torch.testing.assert_close(found_TI, torch.einsum("te,tei->ti", shares_TE, all_TEI))
    assert read == [0, 1, 3]  # once each, and not the expert without tokens

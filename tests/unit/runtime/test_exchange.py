from __future__ import annotations

import torch

from tuckerize.parallel.layouts import Layout
from tuckerize.runtime.exchange import (
    Exchange,
    IntermediateExchange,
    RankExchange,
    exchange_for,
)


def test_exchange_of_one_process_changes_nothing() -> None:
    matrices = [torch.ones(2, 3), torch.zeros(2, 1)]
    exchange = Exchange()
    assert exchange.own_hidden(matrices[0]) is matrices[0]
    assert exchange.gate_up(matrices, [True, False]) is matrices
    assert exchange.down(matrices, [True, False]) is matrices
    assert exchange.output(matrices) is matrices


def test_exchange_for_a_layout_is_its_own() -> None:
    assert isinstance(exchange_for(Layout.INTERMEDIATE, tp_size=2, tp_rank=1), IntermediateExchange)
    rank = exchange_for(Layout.RANK, tp_size=3, tp_rank=2)
    assert isinstance(rank, RankExchange)
    assert (rank.tp_size, rank.tp_rank) == (3, 2)


def test_rank_exchange_own_hidden_of_all_processes_are_all_columns() -> None:
    x = torch.arange(20.0).reshape(2, 10)
    parts = [RankExchange(4, tp_rank).own_hidden(x) for tp_rank in range(4)]
    assert [part.shape[1] for part in parts] == [3, 3, 2, 2]
    assert torch.equal(torch.cat(parts, dim=1), x)

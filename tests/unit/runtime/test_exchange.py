from __future__ import annotations

import pytest
import torch

from tuckerize.ascend.dispatch import FusedPair, FusedUse
from tuckerize.parallel.layouts import Layout, Travel
from tuckerize.parallel.mesh import Axis, Position
from tuckerize.runtime.exchange import (
    Exchange,
    Gather,
    GatherToExperts,
    RankExchange,
    SendFused,
    SendToExperts,
    Share,
    exchange_for,
)

WIDE = Travel(low_input=False, low_output=False)
LOW = Travel(low_input=True, low_output=True)
BOTH = Position(tp=Axis(2, 1), ep=Axis(2, 0))


def test_exchange_of_one_process_changes_nothing() -> None:
    matrices = [torch.ones(2, 3), torch.zeros(2, 1)]
    exchange = exchange_for(Layout.RANK, Position(), LOW, experts=8)
    assert exchange == Exchange([], [])
    assert exchange.own_hidden(matrices[0]) is matrices[0]
    assert exchange.gate_up(matrices, [True, False]) is matrices
    assert exchange.down(matrices, [True, False]) is matrices


@pytest.mark.parametrize(
    ("layout", "low", "early", "late"),
    [
        (Layout.INTERMEDIATE, LOW, [], [Share, SendToExperts]),
        (Layout.INTERMEDIATE, WIDE, [Share, SendToExperts], []),
        (Layout.RANK, LOW, [Share], [SendToExperts]),
        (Layout.RANK, WIDE, [Share, SendToExperts], []),
    ],
)
def test_exchange_for_a_layout_sends_tokens_where_they_are_narrowest(
    layout: Layout, low: Travel, early: list[type], late: list[type]
) -> None:
    exchange = exchange_for(layout, BOTH, low, experts=4)
    assert [type(step) for step in exchange.early] == early
    assert [type(step) for step in exchange.late] == late
    assert exchange.low_output == low.low_output
    assert isinstance(exchange, RankExchange) == (layout == Layout.RANK)


def test_exchange_for_sequence_parallel_processes_gathers_their_tokens() -> None:
    position = BOTH._replace(sequence_parallel=True)
    exchange = exchange_for(Layout.INTERMEDIATE, position, LOW, experts=4)
    assert exchange.late == [Gather(position.tp), SendToExperts(position.ep, 4)]


def test_exchange_for_a_backend_without_all_to_all_gathers_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Axis, "has_all_to_all", property(lambda _: False))
    exchange = exchange_for(Layout.INTERMEDIATE, BOTH, LOW, experts=4)
    assert exchange.late == [Share(BOTH.tp), GatherToExperts(BOTH.ep, 4)]


def test_exchange_for_a_fused_pair_keeps_the_plain_collectives_beside_it() -> None:
    use = FusedUse("A2", "fullmesh", max_tokens=4, hidden=32, top_k=2, num_experts=8, ep_size=2)
    pair = FusedPair(use, "name of a communicator", 0)
    exchange = exchange_for(Layout.INTERMEDIATE, BOTH, LOW, experts=4, fused=pair)
    assert exchange.late == [Share(BOTH.tp), SendFused(pair, SendToExperts(BOTH.ep, 4))]
    assert exchange_for(Layout.INTERMEDIATE, Position(), LOW, experts=8, fused=pair).late == []


def test_rank_exchange_own_hidden_of_all_processes_are_all_columns() -> None:
    x = torch.arange(20.0).reshape(2, 10)
    parts = [RankExchange(tp=Axis(4, tp_rank)).own_hidden(x) for tp_rank in range(4)]
    assert [part.shape[1] for part in parts] == [3, 3, 2, 2]
    assert torch.equal(torch.cat(parts, dim=1), x)

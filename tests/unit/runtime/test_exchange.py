from __future__ import annotations

import pytest
import torch

from tuckerize.ascend.dispatch import FusedPair, FusedUse
from tuckerize.domain import Layout
from tuckerize.parallel.layouts import CommunicationSpace
from tuckerize.parallel.mesh import Axis, Position
from tuckerize.runtime.exchange import (
    AllGatherDispatch,
    AllToAllDispatch,
    Exchange,
    FusedDispatch,
    RankExchange,
    ReplicatedDispatch,
    SequenceParallelDispatch,
    exchange_for,
)

HIDDEN = CommunicationSpace(latent_input=False, latent_output=False)
LATENT = CommunicationSpace(latent_input=True, latent_output=True)
BOTH = Position(tp=Axis(2, 1), ep=Axis(2, 0))


def test_exchange_of_one_process_changes_nothing() -> None:
    matrices = [torch.ones(2, 3), torch.zeros(2, 1)]
    exchange = exchange_for(Layout.RANK, Position(), LATENT, num_experts=8)
    assert exchange == Exchange([], [])
    assert exchange.own_hidden(matrices[0]) is matrices[0]
    assert exchange.gate_up(matrices, [True, False]) is matrices
    assert exchange.down(matrices, [True, False]) is matrices


@pytest.mark.parametrize(
    ("layout", "space", "hidden_steps", "latent_steps"),
    [
        (Layout.INTERMEDIATE, LATENT, [], [ReplicatedDispatch, AllToAllDispatch]),
        (Layout.INTERMEDIATE, HIDDEN, [ReplicatedDispatch, AllToAllDispatch], []),
        (Layout.RANK, LATENT, [ReplicatedDispatch], [AllToAllDispatch]),
        (Layout.RANK, HIDDEN, [ReplicatedDispatch, AllToAllDispatch], []),
    ],
)
def test_exchange_for_a_layout_sends_tokens_where_they_are_narrowest(
    layout: Layout, space: CommunicationSpace, hidden_steps: list[type], latent_steps: list[type]
) -> None:
    exchange = exchange_for(layout, BOTH, space, num_experts=4)
    assert [type(step) for step in exchange.hidden_steps] == hidden_steps
    assert [type(step) for step in exchange.latent_steps] == latent_steps
    assert exchange.latent_output == space.latent_output
    assert isinstance(exchange, RankExchange) == (layout == Layout.RANK)


def test_exchange_for_sequence_parallel_processes_gathers_their_tokens() -> None:
    position = BOTH._replace(sequence_parallel=True)
    exchange = exchange_for(Layout.INTERMEDIATE, position, LATENT, num_experts=4)
    assert exchange.latent_steps == [
        SequenceParallelDispatch(position.tp),
        AllToAllDispatch(position.ep, 4),
    ]


def test_exchange_for_a_backend_without_all_to_all_gathers_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Axis, "has_all_to_all", property(lambda _: False))
    exchange = exchange_for(Layout.INTERMEDIATE, BOTH, LATENT, num_experts=4)
    assert exchange.latent_steps == [ReplicatedDispatch(BOTH.tp), AllGatherDispatch(BOTH.ep, 4)]


def test_exchange_for_a_fused_pair_keeps_the_plain_collectives_beside_it() -> None:
    use = FusedUse("A2", "fullmesh", max_tokens=4, hidden=32, top_k=2, num_experts=8, ep_size=2)
    pair = FusedPair(use, "name of a communicator", 0)
    exchange = exchange_for(Layout.INTERMEDIATE, BOTH, LATENT, num_experts=4, fused=pair)
    assert exchange.latent_steps == [
        ReplicatedDispatch(BOTH.tp),
        FusedDispatch(pair, AllToAllDispatch(BOTH.ep, 4)),
    ]
    assert (
        exchange_for(
            Layout.INTERMEDIATE, Position(), LATENT, num_experts=8, fused=pair
        ).latent_steps
        == []
    )


def test_rank_exchange_own_hidden_of_all_processes_are_all_columns() -> None:
    x = torch.arange(20.0).reshape(2, 10)
    parts = [RankExchange(tp=Axis(4, tp_rank)).own_hidden(x) for tp_rank in range(4)]
    assert [part.shape[1] for part in parts] == [3, 3, 2, 2]
    assert torch.equal(torch.cat(parts, dim=1), x)

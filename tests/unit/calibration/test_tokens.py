"""Tokens of a layer: what is fitted, what is held out, and what every expert sees."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.expert_cases import make_group, make_tokens
from tuckerize.calibration.tokens import LayerTokens
from tuckerize.domain import Projection, StackShape
from tuckerize.names import TensorName

quick = settings(derandomize=True, max_examples=25, deadline=None, database=None)


def numbered(count: int) -> LayerTokens:
    """Tokens that hold their own place."""
    x_TI = torch.arange(count, dtype=torch.float32)[:, None].expand(-1, 2)
    return LayerTokens(x_TI, torch.arange(count)[:, None] % 4, torch.full((count, 1), 0.5))


@quick
@given(count=st.integers(0, 20_000))
def test_split_is_a_partition_in_the_order_of_the_tokens(count: int) -> None:
    tokens = numbered(count)
    fit, held_out = tokens.split()
    places = [part.x_TI[:, 0].int().tolist() for part in (fit, held_out)]
    assert sorted(places[0] + places[1]) == list(range(count))
    assert places == [sorted(own) for own in places]
    assert bool((fit.experts_Tk[:, 0] == fit.x_TI[:, 0] % 4).all())
    assert places[1] == [n for n in range(count) if n // 512 % 16 == 15]
    if count >= 2 * 8192:
        assert 0.05 < len(places[1]) / count < 0.07
    again = tokens.split()
    assert all(torch.equal(a, b) for a, b in zip(again[1], held_out, strict=True))


@pytest.mark.parametrize("count", [0, 1, 512, 15 * 512])
def test_few_tokens_are_all_fitted(count: int) -> None:
    fit, held_out = numbered(count).split()
    assert len(fit.x_TI) == count
    assert len(held_out.x_TI) == 0


@quick
@given(seed=st.integers(0, 1000), count=st.integers(1, 50), least=st.integers(0, 60))
def test_expert_sees_its_tokens_first_and_is_filled_up_evenly(
    seed: int, count: int, least: int
) -> None:
    tokens = make_tokens(count, 3, 5, seed=seed)
    for expert in range(6):  # the last has no tokens at all
        own = tokens.of_expert(expert, least)
        expected = [
            (token, weight)
            for token in range(count)
            for chosen, weight in zip(
                tokens.experts_Tk[token].tolist(), tokens.weights_Tk[token].tolist(), strict=True
            )
            if chosen == expert
        ]
        assert own.routed == len(expected)
        found = zip(own.places_N.tolist(), own.weights_N.tolist(), strict=True)
        assert list(found)[: own.routed] == expected
        assert torch.equal(own.x_NI, tokens.x_TI[own.places_N])
        filled = own.places_N[own.routed :].tolist()
        assert len(filled) == max(0, min(least - own.routed, count))
        assert len(set(filled)) == len(filled)
        if filled:
            assert max(b - a for a, b in zip([-1, *filled], [*filled, count], strict=True)) <= (
                -(-count // len(filled)) + 1
            )
            weight = 0.3 * float(tokens.weights_Tk.mean())
            assert own.weights_N[own.routed :].tolist() == pytest.approx([weight] * len(filled))


def test_layer_without_tokens_gives_no_expert_any() -> None:
    own = make_tokens(0, 3, 5).of_expert(1, 4)
    assert own.routed == len(own.x_NI) == len(own.weights_N) == 0


def test_group_as_tensors_holds_full_cores() -> None:
    group = make_group(StackShape(3, 4, 5), first=6)
    assert group.shape == StackShape(3, 4, 5)
    assert list(group.experts) == [6, 7, 8]
    tensors = group.as_tensors()
    assert tensors.keys() == {TensorName.core(projection) for projection in Projection}
    assert tensors[TensorName.core(Projection.UP)] is group.stacks[Projection.UP]


@quick
@given(count=st.integers(1, 60), least=st.integers(1, 60), most=st.integers(1, 60))
def test_thinned_tokens_are_of_the_same_expert_at_even_distances(
    count: int, least: int, most: int
) -> None:
    own = make_tokens(count, 3, 5).of_expert(1, least)
    few = own.thinned(most)
    step = max(1, len(own.x_NI) // most)
    kept = list(range(0, len(own.x_NI), step))
    assert len(kept) < 2 * most
    assert torch.equal(few.x_NI, own.x_NI[kept])
    assert torch.equal(few.weights_N, own.weights_N[kept])
    assert few.places_N.tolist() == own.places_N[kept].tolist()
    assert few.routed == sum(place < own.routed for place in kept)

"""One budget for all layers: exact, monotone, and the best there is by brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tuckerize.calibration.layer_profile import LayerProfile
from tuckerize.domain import Allocation, MultilinearRank, StackShape, Truncation, stored_parameters
from tuckerize.errors import UsageError
from tuckerize.linalg.hooi import is_reachable
from tuckerize.planning.allocation import (
    Choice,
    Sizes,
    allocate,
    layer_parameters,
)

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

WIDE = StackShape(8, 96, 64)
quick = settings(derandomize=True, max_examples=40, deadline=None, database=None)


def no_tucker(shape: StackShape) -> dict[str, Array]:
    """Curves of the modes that only full Tucker truncates: everything would be lost."""
    expert, intermediate = (np.append(np.ones(n), 0.0) for n in shape[:2])
    return {
        "gate_up_expert_E": expert,
        "gate_up_intermediate_H": intermediate,
        "down_expert_E": expert,
        "down_intermediate_H": intermediate,
    }


def latent(shape: StackShape, neurons: int, gate_up: int, down: int) -> Sizes:
    """Sizes of a width with truncated hidden modes."""
    ranks = (MultilinearRank(shape.experts, neurons, size) for size in (gate_up, down))
    return Sizes(neurons, *ranks)


def make_profile(
    layer: int,
    shape: StackShape,
    *,
    seed: int,
    sensitivity: float = 1.0,
    decays: tuple[float, float, float] | None = None,
) -> LayerProfile:
    """Curves that fall to 0 at full size, as of spectra that decay."""
    random = np.random.default_rng(seed)
    neurons, hidden = shape.intermediate, shape.hidden
    rates = random.uniform(0.5, 8, 3) if decays is None else np.array(decays)

    def tail(size: int, rate: float) -> Array:
        energies = np.exp(-rate * np.arange(size) / size) * random.uniform(0.5, 1, size)
        energies = np.sort(energies)[::-1]
        tails: Array = np.append(np.cumsum(energies[::-1])[::-1], 0.0) / energies.sum()
        return tails

    widths = np.array([neurons, max(1, neurons // 2)], dtype=float)
    gate_up = tail(hidden, rates[1])
    return LayerProfile(
        layer=layer,
        sensitivity=sensitivity,
        selection_H=tail(neurons, rates[0]),
        equal_selection_H=1.3 * tail(neurons, 0.8 * rates[0]),
        widths_K=widths,
        gate_up_KI=np.stack([gate_up, 0.6 * gate_up]),
        down_I=tail(hidden, rates[2]),
        **no_tucker(shape),
        routed_E=np.ones(shape.experts),
    )


def make_profiles(
    count: int, shape: StackShape, seed: int = 0, decays: tuple[float, float, float] | None = None
) -> list[LayerProfile]:
    random = np.random.default_rng(seed)
    return [
        make_profile(
            layer,
            shape,
            seed=seed + layer,
            sensitivity=float(10 ** random.uniform(-2, 2)),
            decays=decays,
        )
        for layer in range(count)
    ]


def dense_parameters(shape: StackShape, groups: int = 1) -> int:
    return 3 * groups * shape.parameters


def stored(choices: list[Choice]) -> int:
    return sum(choice.parameters for choice in choices)


def damage(choices: list[Choice]) -> float:
    return sum(choice.damage for choice in choices)


def check_choices(
    choices: list[Choice],
    profiles: list[LayerProfile],
    shape: StackShape,
    groups: int,
    multiples: tuple[int, int],
) -> None:
    """Sizes that a group can have, counted and predicted as they say."""
    for choice, profile in zip(choices, profiles, strict=True):
        neurons, gate_up, down = choice.sizes
        assert neurons == shape.intermediate or shape.experts * neurons % multiples[0] == 0
        for size, coupled in ((gate_up, 2), (down, 1)):
            assert size.hidden == shape.hidden or size.hidden % multiples[1] == 0
            slim = shape._replace(intermediate=neurons)
            assert is_reachable(size, slim, coupled=coupled)
        assert choice.parameters == layer_parameters(shape, groups, choice.sizes)
        if any(size[:2] != (shape.experts, neurons) for size in (gate_up, down)):
            assert neurons == shape.intermediate  # full Tucker, where it is predicted to be as good
            continue
        plain = (neurons, gate_up.hidden, down.hidden)
        error = profile.errors(*(np.array([float(size)]) for size in plain))[0, 0, 0]
        assert choice.error == pytest.approx(error)
        assert choice.damage == pytest.approx(error * profile.sensitivity)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[LayerProfile], StackShape, int, tuple[int, int]]:
    shape = StackShape(draw(st.integers(1, 4)), draw(st.integers(2, 24)), draw(st.integers(2, 24)))
    multiples = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    profiles = make_profiles(draw(st.integers(1, 4)), shape, draw(st.integers(0, 1000)))
    return profiles, shape, draw(st.integers(1, 3)), multiples


@quick
@given(
    problem=problems(),
    keep=st.floats(0.02, 1),
    allowed=st.sampled_from([Truncation.AUTO, Truncation.LATENT, Truncation.NEURONS]),
    how=st.sampled_from(list(Allocation)),
)
def test_any_budget_is_never_exceeded(
    problem: tuple[list[LayerProfile], StackShape, int, tuple[int, int]],
    keep: float,
    allowed: Truncation,
    how: Allocation,
) -> None:
    profiles, shape, groups, multiples = problem
    try:
        choices = allocate(
            profiles,
            shape,
            groups=groups,
            keep=keep,
            multiples=multiples,
            allowed=allowed,
            how=how,
        )
    except UsageError:
        assume(False)
        raise
    check_choices(choices, profiles, shape, groups, multiples)
    dense = dense_parameters(shape, groups)
    assert stored(choices) <= keep * dense * len(profiles) * (1 + 1e-12)
    if how == "uniform":
        assert all(choice.parameters <= keep * dense * (1 + 1e-12) for choice in choices)
    if allowed == "latent":
        assert all(choice.sizes.neurons == shape.intermediate for choice in choices)
    if allowed == "neurons":
        assert all(c.sizes.gate_up.hidden == c.sizes.down.hidden == shape.hidden for c in choices)


@pytest.mark.parametrize("keep", [0.35, 0.5, 0.6, 0.75, 0.85, 0.97])
@pytest.mark.parametrize("layers", [6, 11])
@pytest.mark.parametrize("allowed", [Truncation.AUTO, Truncation.LATENT, Truncation.NEURONS])
def test_budget_of_several_layers_is_used_to_one_percent(
    keep: float, layers: int, allowed: Truncation
) -> None:
    profiles = make_profiles(layers, WIDE, seed=layers)
    choices = allocate(profiles, WIDE, groups=1, keep=keep, multiples=(8, 8), allowed=allowed)
    budget = keep * layers * dense_parameters(WIDE)
    # With one of the two alone the smallest step of a layer can be more than that.
    step = {"auto": 0, "latent": 8 * (2 * 8 * 96 + 64), "neurons": 8 * 3 * 8 * 64}[allowed]
    assert min(0.99 * budget, budget - step) <= stored(choices) <= budget


@quick
@given(problem=problems(), keeps=st.tuples(st.floats(0.02, 1), st.floats(0.02, 1)))
def test_more_budget_never_has_more_predicted_damage(
    problem: tuple[list[LayerProfile], StackShape, int, tuple[int, int]],
    keeps: tuple[float, float],
) -> None:
    profiles, shape, groups, multiples = problem
    low, high = sorted(keeps)
    try:
        less = allocate(profiles, shape, groups=groups, keep=low, multiples=multiples)
    except UsageError:
        assume(False)
        raise
    more = allocate(profiles, shape, groups=groups, keep=high, multiples=multiples)
    assert damage(more) <= damage(less) * (1 + 1e-9)
    for how in Allocation:
        whole = allocate(profiles, shape, groups=groups, keep=1, multiples=multiples, how=how)
        full = latent(shape, shape.intermediate, shape.hidden, shape.hidden)
        assert [choice.sizes for choice in whole] == [full] * len(profiles)
        assert damage(whole) == 0


@quick
@given(seed=st.integers(0, 1000), keep=st.floats(0.2, 0.99), equal_widths=st.booleans())
def test_no_other_sizes_within_the_budget_are_predicted_to_do_less_damage(
    seed: int, keep: float, equal_widths: bool
) -> None:
    shape = StackShape(2, 6, 6)
    profiles = make_profiles(2, shape, seed)
    budget = keep * 2 * dense_parameters(shape)
    # Two experts whose widths are even have any mean width.
    widths = (2, 4, 6) if equal_widths else (2, 3, 4, 5, 6)
    options = []
    for profile in profiles:
        curve = profile.equal_selection_H if equal_widths else profile.selection_H
        own = replace(profile, selection_H=curve)
        sizes = [latent(shape, *chosen) for chosen in itertools.product(widths, *((2, 4, 6),) * 2)]
        axes = (widths, (2, 4, 6), (2, 4, 6))
        errors = own.errors(*(np.array(axis, dtype=float) for axis in axes)).reshape(-1)
        options.append(
            [
                (layer_parameters(shape, 1, chosen), float(error) * profile.sensitivity)
                for chosen, error in zip(sizes, errors, strict=True)
            ]
        )
    feasible = [a[1] + b[1] for a, b in itertools.product(*options) if a[0] + b[0] <= budget + 1e-6]
    try:
        choices = allocate(
            profiles,
            shape,
            groups=1,
            keep=keep,
            multiples=(2, 2),
            equal_widths=equal_widths,
        )
    except UsageError:
        assert not feasible
        return
    assert damage(choices) == pytest.approx(min(feasible), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("equal_widths", [True, False])
def test_real_sizes_use_the_budget_whose_parameters_are_counted_in_units(
    equal_widths: bool,
) -> None:
    """DeepSeek-V2-Lite's: the budget is too large to be counted number by number."""
    shape = StackShape(64, 1408, 2048)
    profiles = make_profiles(6, shape, seed=3, decays=(2.0, 6.0, 6.0))
    choices = allocate(
        profiles, shape, groups=1, keep=0.6, multiples=(128, 128), equal_widths=equal_widths
    )
    budget = 0.6 * 6 * dense_parameters(shape)
    assert (1 - 1e-2 if equal_widths else 1 - 2e-3) * budget <= stored(choices) <= budget


def test_layers_share_by_sensitivity_and_alike_layers_equally() -> None:
    alike = [make_profile(layer, WIDE, seed=5) for layer in range(6)]
    even = allocate(alike, WIDE, groups=1, keep=0.6, multiples=(8, 8))
    uniform = allocate(alike, WIDE, groups=1, keep=0.6, multiples=(8, 8), how=Allocation.UNIFORM)
    assert damage(even) <= damage(uniform)
    assert max(c.parameters for c in even) <= 1.2 * min(c.parameters for c in even)
    uneven = [make_profile(layer, WIDE, seed=5, sensitivity=10.0**layer) for layer in range(6)]
    parameters = [
        c.parameters for c in allocate(uneven, WIDE, groups=1, keep=0.6, multiples=(8, 8))
    ]
    assert parameters[0] < parameters[-1]
    uniform = allocate(uneven, WIDE, groups=1, keep=0.6, multiples=(8, 8), how=Allocation.UNIFORM)
    assert len({choice.sizes for choice in uniform}) == 1


@pytest.mark.parametrize(
    ("decays", "expected"),
    [((0.1, 9.0, 9.0), "hidden"), ((9.0, 0.1, 0.1), "neurons")],
)
def test_what_falls_fastest_is_truncated(decays: tuple[float, float, float], expected: str) -> None:
    profiles = make_profiles(6, WIDE, decays=decays)
    choices = allocate(profiles, WIDE, groups=1, keep=0.6, multiples=(8, 8))
    neurons = sum(choice.sizes.neurons for choice in choices) / WIDE.intermediate
    hidden = sum(c.sizes.gate_up.hidden + c.sizes.down.hidden for c in choices) / (2 * WIDE.hidden)
    assert (hidden < neurons) == (expected == "hidden")


def test_straight_curves_stay_within_the_budget() -> None:
    """All steps of a layer have one slope up to rounding: their order must not matter."""
    shape = StackShape(3, 40, 5)
    for seed in range(30):
        random = np.random.default_rng(seed)
        profiles = [
            LayerProfile(
                layer=layer,
                sensitivity=float(random.uniform(0.1, 1)),
                selection_H=float(random.uniform(0.1, 1)) * (1 - np.arange(41) / 40),
                equal_selection_H=np.zeros(41),
                widths_K=np.array([40.0]),
                gate_up_KI=np.linspace(1, 0, 6)[None],
                down_I=np.linspace(1, 0, 6),
                **no_tucker(shape),
                routed_E=np.ones(3),
            )
            for layer in range(3)
        ]
        for keep in (0.3, 0.51, 0.77):
            choices = allocate(
                profiles, shape, groups=1, keep=keep, multiples=(1, 1), allowed=Truncation.NEURONS
            )
            assert stored(choices) <= keep * 3 * dense_parameters(shape) * (1 + 1e-12)


@pytest.mark.parametrize("how", list(Allocation))
@pytest.mark.parametrize("allowed", [Truncation.AUTO, Truncation.LATENT, Truncation.FULL])
def test_budget_below_the_smallest_sizes_names_the_smallest_that_works(
    allowed: Truncation, how: Allocation
) -> None:
    profiles = make_profiles(2, WIDE)
    with pytest.raises(UsageError, match=r"keep 0\.001 is below") as caught:
        allocate(profiles, WIDE, groups=1, keep=0.001, multiples=(8, 8), allowed=allowed, how=how)
    named = float(caught.value.hint.split("at least ")[1].split(",")[0])
    for keep in (named, named - 0.001):
        try:
            choices = allocate(
                profiles, WIDE, groups=1, keep=keep, multiples=(8, 8), allowed=allowed, how=how
            )
        except UsageError:
            assert keep < named
        else:
            assert keep == named
            if allowed == "latent":
                assert {choice.sizes for choice in choices} == {latent(WIDE, 96, 8, 8)}


def test_full_tucker_is_taken_where_it_is_predicted_to_lose_least() -> None:
    profiles = make_profiles(4, WIDE)
    expert = np.append(np.full(WIDE.experts, 1e-3), 0.0)
    redundant = [
        replace(profile, gate_up_expert_E=expert, down_expert_E=expert) for profile in profiles
    ]

    def best(allowed: Truncation) -> list[Choice]:
        return allocate(redundant, WIDE, groups=1, keep=0.5, multiples=(8, 8), allowed=allowed)

    assert damage(best(Truncation.AUTO)) < damage(best(Truncation.LATENT))
    assert any(choice.sizes.gate_up.expert < WIDE.experts for choice in best(Truncation.AUTO))
    for choice in (*best(Truncation.AUTO), *best(Truncation.FULL)):
        assert choice.parameters == layer_parameters(WIDE, 1, choice.sizes)
        slim = WIDE._replace(intermediate=choice.sizes.neurons)
        assert is_reachable(choice.sizes.gate_up, slim, coupled=2)
        assert is_reachable(choice.sizes.down, slim)


def test_parameters_are_those_of_the_stored_tucker_tensors() -> None:
    sizes = latent(WIDE, 40, 24, 64)
    expected = stored_parameters(
        StackShape(8, 40, 64), MultilinearRank(8, 40, 24), coupled=2
    ) + stored_parameters(StackShape(8, 40, 64), MultilinearRank(8, 40, 64))
    assert layer_parameters(WIDE, 3, sizes) == 3 * expected
    assert layer_parameters(WIDE, 1, latent(WIDE, 96, 64, 64)) == dense_parameters(WIDE)

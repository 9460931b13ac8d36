"""One budget for all layers: exact, monotone, and the best there is by brute force."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tuckerize.calibration.layer_profile import LayerProfile
from tuckerize.compression.target import CompressionTarget
from tuckerize.domain import (
    DOWN,
    ENCODINGS,
    GATE_UP,
    Allocation,
    CoreType,
    MultilinearRank,
    StackShape,
    Truncation,
)
from tuckerize.errors import UsageError
from tuckerize.linalg.hooi import is_reachable
from tuckerize.planning.allocation import Allocator, SearchSpace, widest_within
from tuckerize.planning.budget import Budget
from tuckerize.planning.calibrated import CalibratedModel, RuleBudget
from tuckerize.planning.knapsack import Choice, Slopes, predicted_kl
from tuckerize.recipe import CalibrationSettings, Rule
from tuckerize.weight_types import WEIGHT_TYPES

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

WIDE = StackShape(8, 96, 64)
quick = settings(derandomize=True, max_examples=40, deadline=None, database=None)


def allocate(
    profiles: list[LayerProfile],
    space: SearchSpace,
    *,
    keep: float,
    how: Allocation = Allocation.ERROR,
) -> list[Choice]:
    return Allocator.of(profiles, [space], how).choose(Budget(keep))


def no_tucker(shape: StackShape) -> dict[str, Array]:
    """Curves of the modes that only full Tucker truncates: everything would be lost."""
    expert, intermediate = (np.append(np.ones(n), 0.0) for n in shape[:2])
    return {
        "gate_up_expert_E": expert,
        "gate_up_intermediate_H": intermediate,
        "down_expert_E": expert,
        "down_intermediate_H": intermediate,
    }


class Sizes(NamedTuple):
    """Width of the experts, and core sizes of gate and up, and of down."""

    neurons: int
    gate_up: MultilinearRank
    down: MultilinearRank


def sizes_of(choice: Choice) -> Sizes:
    """Sizes that were chosen for a layer."""
    ranks = choice.target.ranks
    return Sizes(choice.target.neurons, ranks[GATE_UP], ranks[DOWN])


def search_space(
    shape: StackShape,
    *,
    groups: int = 1,
    multiples: tuple[int, int] = (8, 8),
    truncation: Truncation = Truncation.AUTO,
    equal_widths: bool = False,
    dtype: str = "BF16",
) -> SearchSpace:
    return SearchSpace(shape, groups, WEIGHT_TYPES[dtype], multiples, truncation, equal_widths)


def layer_bytes(shape: StackShape, groups: int, sizes: Sizes) -> int:
    """Bytes of a layer in bfloat16, tensor by tensor; gate and up share one U_I."""
    experts, _, hidden = shape
    values = 0
    for rank, coupled in ((sizes.gate_up, 2), (sizes.down, 1)):
        r_E, r_H, r_I = rank
        values += coupled * r_E * r_H * r_I
        values += coupled * experts * r_E if r_E < experts else 0
        values += coupled * sizes.neurons * r_H if r_H < sizes.neurons else 0
        values += hidden * r_I if r_I < hidden else 0
    return 2 * groups * values


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
    switching: float = 0.0,
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
        small_sensitivity=sensitivity,
        switching=switching,
        selection_H=tail(neurons, rates[0]),
        equal_selection_H=1.3 * tail(neurons, 0.8 * rates[0]),
        widths_K=widths,
        gate_up_KI=np.stack([gate_up, 0.6 * gate_up]),
        down_I=tail(hidden, rates[2]),
        **no_tucker(shape),
        rounding_C=np.array([1e-4, 1e-2]),
        routed_E=np.ones(shape.experts),
    )


def make_profiles(
    count: int,
    shape: StackShape,
    seed: int = 0,
    decays: tuple[float, float, float] | None = None,
    *,
    switching: bool = True,
) -> list[LayerProfile]:
    random = np.random.default_rng(seed)
    return [
        make_profile(
            layer,
            shape,
            seed=seed + layer,
            sensitivity=float(10 ** random.uniform(-2, 2)),
            switching=float(10 ** random.uniform(-3, 1)) * switching,
            decays=decays,
        )
        for layer in range(count)
    ]


def dense_bytes(shape: StackShape, groups: int = 1) -> int:
    return 2 * 3 * groups * shape.parameters


def stored(choices: list[Choice]) -> int:
    return sum(choice.bytes for choice in choices)


def check_choices(
    choices: list[Choice],
    profiles: list[LayerProfile],
    shape: StackShape,
    groups: int,
    multiples: tuple[int, int],
) -> None:
    """Sizes that a group can have, counted and predicted as they say."""
    for choice, profile in zip(choices, profiles, strict=True):
        neurons, gate_up, down = sizes_of(choice)
        assert neurons == shape.intermediate or shape.experts * neurons % multiples[0] == 0
        for size, coupled in ((gate_up, 2), (down, 1)):
            assert size.hidden == shape.hidden or size.hidden % multiples[1] == 0
            slim = shape._replace(intermediate=neurons)
            assert is_reachable(size, slim, coupled=coupled)
        assert choice.bytes == layer_bytes(shape, groups, sizes_of(choice))
        if any(size[:2] != (shape.experts, neurons) for size in (gate_up, down)):
            assert neurons == shape.intermediate  # full Tucker, where it is predicted to be as good
            continue
        plain = (neurons, gate_up.hidden, down.hidden)
        error = profile.errors(*(np.array([float(size)]) for size in plain))[0, 0, 0]
        assert choice.error == pytest.approx(error)


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
            search_space(shape, groups=groups, multiples=multiples, truncation=allowed),
            keep=keep,
            how=how,
        )
    except UsageError:
        assume(False)
        raise
    check_choices(choices, profiles, shape, groups, multiples)
    dense = dense_bytes(shape, groups)
    assert stored(choices) <= keep * dense * len(profiles) * (1 + 1e-12)
    if how == "uniform":
        assert all(choice.bytes <= keep * dense * (1 + 1e-12) for choice in choices)
    if allowed == "latent":
        assert all(sizes_of(choice).neurons == shape.intermediate for choice in choices)
    if allowed == "neurons":
        assert all(
            sizes_of(c).gate_up.hidden == sizes_of(c).down.hidden == shape.hidden for c in choices
        )


@pytest.mark.parametrize("keep", [0.35, 0.5, 0.6, 0.75, 0.85, 0.97])
@pytest.mark.parametrize("layers", [6, 11])
@pytest.mark.parametrize("allowed", [Truncation.AUTO, Truncation.LATENT, Truncation.NEURONS])
def test_budget_of_several_layers_is_used_to_one_percent(
    keep: float, layers: int, allowed: Truncation
) -> None:
    profiles = make_profiles(layers, WIDE, seed=layers)
    choices = allocate(profiles, search_space(WIDE, truncation=allowed), keep=keep)
    budget = keep * layers * dense_bytes(WIDE)
    # With one of the two alone the smallest step of a layer can be more than that.
    step = {"auto": 0, "latent": 2 * 8 * (2 * 8 * 96 + 64), "neurons": 2 * 8 * 3 * 8 * 64}[allowed]
    assert min(0.99 * budget, budget - step) <= stored(choices) <= budget


@quick
@given(problem=problems(), keeps=st.tuples(st.floats(0.02, 1), st.floats(0.02, 1)))
def test_more_budget_never_has_higher_predicted_kl(
    problem: tuple[list[LayerProfile], StackShape, int, tuple[int, int]],
    keeps: tuple[float, float],
) -> None:
    profiles, shape, groups, multiples = problem
    low, high = sorted(keeps)
    try:
        less = allocate(profiles, search_space(shape, groups=groups, multiples=multiples), keep=low)
    except UsageError:
        assume(False)
        raise
    more = allocate(profiles, search_space(shape, groups=groups, multiples=multiples), keep=high)
    assert predicted_kl(more) <= predicted_kl(less) * (1 + 1e-9)
    for how in Allocation:
        whole = allocate(
            profiles, search_space(shape, groups=groups, multiples=multiples), keep=1, how=how
        )
        full = latent(shape, shape.intermediate, shape.hidden, shape.hidden)
        assert [sizes_of(choice) for choice in whole] == [full] * len(profiles)
        assert predicted_kl(whole) == 0


@quick
@given(
    seed=st.integers(0, 1000),
    keep=st.floats(0.2, 0.99),
    equal_widths=st.booleans(),
    switching=st.booleans(),
)
def test_no_other_sizes_within_the_budget_are_predicted_to_have_less_kl(
    seed: int, keep: float, equal_widths: bool, switching: bool
) -> None:
    shape = StackShape(2, 6, 6)
    profiles = make_profiles(2, shape, seed, switching=switching)
    budget = keep * 2 * dense_bytes(shape)
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
                (
                    layer_bytes(shape, 1, chosen),
                    float(error) * profile.sensitivity,
                    float(error) * profile.switching**2,
                )
                for chosen, error in zip(sizes, errors, strict=True)
            ]
        )
    feasible = [
        second + math.sqrt(first)
        for stored, second, first in (
            [sum(own) for own in zip(*both, strict=True)] for both in itertools.product(*options)
        )
        if stored <= budget + 1e-6
    ]
    try:
        choices = allocate(
            profiles, search_space(shape, multiples=(2, 2), equal_widths=equal_widths), keep=keep
        )
    except UsageError:
        assert not feasible
        return
    within = 1.07 if switching else 1 + 1e-9
    found = predicted_kl(choices)
    assert min(feasible) * (1 - 1e-9) - 1e-15 <= found <= min(feasible) * within + 1e-15


@pytest.mark.parametrize(
    ("error", "kl"), [(0.1, 0.02 + 0.5**0.5 * 0.1), (1.0, 2 * (2.0 - 0.25) + 0.5**0.5 * 0.5)]
)
def test_layers_that_switch_experts_add_up_in_squares(error: float, kl: float) -> None:
    """By slopes of probes whose larger error is 0.5."""
    target = CompressionTarget(8, {GATE_UP: MultilinearRank(1, 8, 8)})
    choice = Choice(target, 0, error**2, Slopes(2.0, 1.0, 0.5))
    assert predicted_kl([choice, choice]) == pytest.approx(kl)


@quick
@given(
    sensitivity=st.floats(0.1, 10), small=st.floats(0, 1), probed=st.floats(0.01, 1),
    errors=st.tuples(st.floats(0, 2), st.floats(0, 2)),
)  # fmt: skip
def test_divergence_of_a_layer_goes_through_the_probe_and_grows_with_the_square_beyond_it(
    sensitivity: float, small: float, probed: float, errors: tuple[float, float]
) -> None:
    slopes = Slopes(sensitivity, small * sensitivity, (1 - small) * sensitivity * probed)

    def kl(error: float) -> float:
        second, first = slopes.terms(np.array(error**2))
        return float(second + np.sqrt(first))

    low, high = sorted(errors)
    assert kl(low) <= kl(high) * (1 + 1e-9) + 1e-12
    for error in (probed, 3 * probed):
        assert kl(error) == pytest.approx(sensitivity * error**2)
    assert kl(probed / 4) >= kl(probed) / 16 * (1 - 1e-9)


def test_keep_counts_the_rounding_that_follows() -> None:
    settings = CalibrationSettings(texts=("text.txt",))
    model = CalibratedModel(settings, WIDE, 1, WEIGHT_TYPES["BF16"])
    budget = RuleBudget.of(Rule(keep=1.0), model, CoreType.W4)
    assert budget is not None
    for choice in budget.choose(make_profiles(3, WIDE)):
        assert choice.target.cores == CoreType.W4
        assert choice.error == pytest.approx(1e-2)


def test_small_errors_are_avoided_where_later_layers_switch_experts() -> None:
    """Two layers alike but for the term of first order, which weighs more at a larger budget."""

    def widths(keep: float) -> list[int]:
        profiles = [
            make_profile(layer, WIDE, seed=5, sensitivity=1.0, switching=own)
            for layer, own in enumerate((0.03, 0.0))
        ]
        return [choice.bytes for choice in allocate(profiles, search_space(WIDE), keep=keep)]

    (first, last), (first_of_less, last_of_less) = widths(0.9), widths(0.3)
    assert first / last > first_of_less / last_of_less >= 1


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_layers_for_fused_kernels_have_one_latent_size_or_no_factor(keep: float) -> None:
    space = search_space(WIDE, truncation=Truncation.NARROW_LATENT, equal_widths=True)
    choices = allocate(make_profiles(4, WIDE, seed=2), space, keep=keep)
    latent = [choice.target.ranks[DOWN].hidden < WIDE.hidden for choice in choices]
    assert any(latent) or keep > 0.8
    for choice in choices:
        neurons, gate_up, down = sizes_of(choice)
        assert gate_up == down == MultilinearRank(WIDE.experts, neurons, down.hidden)
    # What any engine takes, these kernels do.
    stock = search_space(WIDE, truncation=Truncation.NEURONS, equal_widths=True)
    assert predicted_kl(choices) <= predicted_kl(
        allocate(make_profiles(4, WIDE, seed=2), stock, keep=keep)
    )


@pytest.mark.parametrize("equal_widths", [True, False])
def test_real_sizes_use_the_budget_whose_parameters_are_counted_in_units(
    equal_widths: bool,
) -> None:
    """DeepSeek-V2-Lite's: the budget is too large to be counted number by number."""
    shape = StackShape(64, 1408, 2048)
    profiles = make_profiles(6, shape, seed=3, decays=(2.0, 6.0, 6.0))
    choices = allocate(
        profiles, search_space(shape, multiples=(128, 128), equal_widths=equal_widths), keep=0.6
    )
    budget = 0.6 * 6 * dense_bytes(shape)
    assert (1 - 1e-2 if equal_widths else 1 - 2e-3) * budget <= stored(choices) <= budget


def test_layers_share_by_sensitivity_and_alike_layers_equally() -> None:
    alike = [make_profile(layer, WIDE, seed=5) for layer in range(6)]
    even = allocate(alike, search_space(WIDE), keep=0.6)
    uniform = allocate(alike, search_space(WIDE), keep=0.6, how=Allocation.UNIFORM)
    assert predicted_kl(even) <= predicted_kl(uniform)
    assert max(c.bytes for c in even) <= 1.2 * min(c.bytes for c in even)
    uneven = [make_profile(layer, WIDE, seed=5, sensitivity=10.0**layer) for layer in range(6)]
    parameters = [c.bytes for c in allocate(uneven, search_space(WIDE), keep=0.6)]
    assert parameters[0] < parameters[-1]
    uniform = allocate(uneven, search_space(WIDE), keep=0.6, how=Allocation.UNIFORM)
    assert len({sizes_of(choice) for choice in uniform}) == 1


@pytest.mark.parametrize(
    ("decays", "expected"),
    [((0.1, 9.0, 9.0), "hidden"), ((9.0, 0.1, 0.1), "neurons")],
)
def test_what_falls_fastest_is_truncated(decays: tuple[float, float, float], expected: str) -> None:
    profiles = make_profiles(6, WIDE, decays=decays)
    choices = allocate(profiles, search_space(WIDE), keep=0.6)
    neurons = sum(sizes_of(choice).neurons for choice in choices) / WIDE.intermediate
    hidden = sum(sizes_of(c).gate_up.hidden + sizes_of(c).down.hidden for c in choices) / (
        2 * WIDE.hidden
    )
    assert (hidden < neurons) == (expected == "hidden")


def test_straight_curves_stay_within_the_budget() -> None:
    """All steps of a layer have one slope up to rounding: their order must not matter."""
    shape = StackShape(3, 40, 5)
    for seed in range(30):
        random = np.random.default_rng(seed)
        profiles = [
            LayerProfile(
                layer=layer,
                sensitivity=(own := float(random.uniform(0.1, 1))),
                small_sensitivity=own,
                switching=0.0,
                selection_H=float(random.uniform(0.1, 1)) * (1 - np.arange(41) / 40),
                equal_selection_H=np.zeros(41),
                widths_K=np.array([40.0]),
                gate_up_KI=np.linspace(1, 0, 6)[None],
                down_I=np.linspace(1, 0, 6),
                **no_tucker(shape),
                rounding_C=np.array([1e-4, 1e-2]),
                routed_E=np.ones(3),
            )
            for layer in range(3)
        ]
        for keep in (0.3, 0.51, 0.77):
            choices = allocate(
                profiles,
                search_space(shape, multiples=(1, 1), truncation=Truncation.NEURONS),
                keep=keep,
            )
            assert stored(choices) <= keep * 3 * dense_bytes(shape) * (1 + 1e-12)


@pytest.mark.parametrize("how", list(Allocation))
@pytest.mark.parametrize("allowed", [Truncation.AUTO, Truncation.LATENT, Truncation.FULL])
def test_budget_below_the_smallest_sizes_names_the_smallest_that_works(
    allowed: Truncation, how: Allocation
) -> None:
    profiles = make_profiles(2, WIDE)
    with pytest.raises(UsageError, match=r"keep 0\.001 is below") as caught:
        allocate(profiles, search_space(WIDE, truncation=allowed), keep=0.001, how=how)
    named = float(caught.value.hint.split("at least ")[1].split(",")[0])
    for keep in (named, named - 0.001):
        try:
            choices = allocate(profiles, search_space(WIDE, truncation=allowed), keep=keep, how=how)
        except UsageError:
            assert keep < named
        else:
            assert keep == named
            if allowed == "latent":
                assert {sizes_of(choice) for choice in choices} == {latent(WIDE, 96, 8, 8)}


def test_full_tucker_is_taken_where_it_is_predicted_to_lose_least() -> None:
    profiles = make_profiles(4, WIDE)
    expert = np.append(np.full(WIDE.experts, 1e-3), 0.0)
    redundant = [
        replace(profile, gate_up_expert_E=expert, down_expert_E=expert) for profile in profiles
    ]

    def best(allowed: Truncation) -> list[Choice]:
        return allocate(redundant, search_space(WIDE, truncation=allowed), keep=0.5)

    assert predicted_kl(best(Truncation.AUTO)) < predicted_kl(best(Truncation.LATENT))
    assert any(sizes_of(choice).gate_up.expert < WIDE.experts for choice in best(Truncation.AUTO))
    for choice in (*best(Truncation.AUTO), *best(Truncation.FULL)):
        assert choice.bytes == layer_bytes(WIDE, 1, sizes_of(choice))
        slim = WIDE._replace(intermediate=sizes_of(choice).neurons)
        assert is_reachable(sizes_of(choice).gate_up, slim, coupled=2)
        assert is_reachable(sizes_of(choice).down, slim)


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("dtype", ["F16", "F32", "F64"])
def test_choices_do_not_depend_on_the_bytes_of_a_value(dtype: str, keep: float) -> None:
    """For one type, shares of bytes and of parameters are the same; so are the knapsack's units."""
    for shape in (WIDE, StackShape(2, 6, 6)):
        multiples = (8, 8) if shape == WIDE else (1, 1)
        profiles = make_profiles(3, shape)
        by_type = [
            allocate(profiles, search_space(shape, multiples=multiples, dtype=name), keep=keep)
            for name in ("BF16", dtype)
        ]
        assert [sizes_of(choice) for choice in by_type[0]] == [sizes_of(c) for c in by_type[1]]


def test_search_space_counts_the_parameters_of_a_layer() -> None:
    space = search_space(WIDE, groups=3)
    target = allocate(make_profiles(1, WIDE), space, keep=0.5)[0].target
    sizes = Sizes(target.neurons, target.ranks[GATE_UP], target.ranks[DOWN])
    assert 2 * space.stored_parameters(target) == layer_bytes(WIDE, 3, sizes)
    assert space.dense_bytes == dense_bytes(WIDE, 3)


@settings(quick, max_examples=4)
@given(
    bits=st.floats(1.5, 16),
    seed=st.integers(0, 99),
    allowed=st.sampled_from([Truncation.AUTO, Truncation.NEURONS]),
)
def test_encodings_that_may_be_mixed_lose_least_and_fill_the_budget(
    bits: float, seed: int, allowed: Truncation
) -> None:
    shape = StackShape(8, 512, 256)
    profiles = make_profiles(12, shape, seed)
    spaces = [
        replace(
            search_space(shape, multiples=(32, 32), truncation=allowed),
            weights=replace(WEIGHT_TYPES["BF16"], cores=cores),
        )
        for cores in ENCODINGS
    ]
    budget = Budget.of_bits(bits, dense_bits=16)
    mixed = Allocator.of(profiles, spaces).choose(budget)
    for choice in mixed:  # bytes are those of the target
        own = [choice.target.stored_bytes(shape, c, WEIGHT_TYPES["BF16"]) for c in (GATE_UP, DOWN)]
        assert choice.bytes == sum(own)
    found = 8 * stored(mixed) / (12 * 3 * shape.parameters)
    assert found <= bits
    # Below 4.5 bits every layer is truncated, in small steps. Above, one of twelve may have no use
    # for what is left before it is 8 bits: from w8 to 16 bits.
    assert found > (0.99 * bits if bits < 4.5 else bits - 8 / 12)
    for space in spaces:
        try:
            alone = Allocator.of(profiles, [space]).choose(budget)
        except UsageError:
            continue
        assert predicted_kl(mixed) <= predicted_kl(alone) * 1.01


@quick
@given(
    widths=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    outputs=st.integers(1, 9),
    multiple=st.sampled_from([1, 4, 8, 32]),
    cores=st.sampled_from(CoreType),
)
def test_experts_of_different_widths_never_store_more_than_was_counted(
    widths: list[int], outputs: int, multiple: int, cores: CoreType
) -> None:
    weights = replace(WEIGHT_TYPES["BF16"], cores=cores)
    own = [multiple * width for width in widths]
    exact = sum(
        weights.core_bytes((1, width, outputs), transposed=True, width_step=None) for width in own
    )
    assume(sum(own) % len(own) == 0)
    rank = (len(own), sum(own) // len(own), outputs)
    counted = weights.core_bytes(rank, transposed=True, width_step=multiple)
    assert exact <= counted
    if multiple % max(cores.word_codes, cores.group_size or 1) == 0:
        assert exact == counted


@quick
@given(
    keep=st.floats(0.1, 1),
    cores=st.sampled_from([None, CoreType.W8, CoreType.W4]),
    groups=st.sampled_from([1, 2]),
    multiple=st.sampled_from([8, 32]),
)
def test_equal_widths_without_profiles_are_those_with_them(
    keep: float, cores: CoreType | None, groups: int, multiple: int
) -> None:
    space = search_space(
        WIDE,
        groups=groups,
        multiples=(multiple, multiple),
        truncation=Truncation.NEURONS,
        equal_widths=True,
    )
    space = replace(space, weights=replace(space.weights, cores=cores))
    profiles = make_profiles(3, WIDE)
    try:
        choices = allocate(profiles, space, keep=keep, how=Allocation.UNIFORM)
    except UsageError:
        assume(False)
    assert all(choice.target == widest_within(Budget(keep), space) for choice in choices)

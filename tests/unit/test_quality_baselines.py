"""Laws of the competitors' methods in benchmarks/quality."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch

from benchmarks.quality.budget import covering_sizes, equal_sizes, largest, pooled_sizes
from benchmarks.quality.encodings import Encoding
from benchmarks.quality.layer import Compressed, Layer, Sensitivity, output_error, roots, triple
from benchmarks.quality.methods import low_rank, mobe, parser, pruning, slbf, slimming, tucker
from benchmarks.quality.registry import METHODS

EXPERTS, INTERMEDIATE, HIDDEN, TOP_K, TOKENS = 6, 20, 24, 2, 900


@cache
def layer(seed: int = 0) -> Layer:
    """Random experts that share some structure, on tokens of uneven directions and routing."""
    g = torch.Generator().manual_seed(seed)
    size = (EXPERTS, INTERMEDIATE, HIDDEN)
    shared = torch.randn(3, 1, INTERMEDIATE, HIDDEN, generator=g)
    gate, up, down = torch.randn(3, *size, generator=g) + 0.5 * shared
    scale_I = torch.logspace(0, -1.5, HIDDEN)
    rotation, _ = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=g))
    x = torch.randn(TOKENS, HIDDEN, generator=g) * scale_I @ rotation
    scores = (x @ torch.randn(HIDDEN, EXPERTS, generator=g)).softmax(-1)
    weights, experts = scores.topk(TOP_K)
    fisher = torch.rand(3, *size, generator=g)
    slopes = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=g)
    sensitivity = Sensitivity((fisher[0], fisher[1], fisher[2]), slopes @ slopes.mT)
    norms = 1 + torch.rand(TOKENS, generator=g)
    return Layer((gate / 5, up / 5, down / 5), x, experts, weights, sensitivity, norms)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(mobe, "STEPS", 20)
    monkeypatch.setattr(mobe, "TRIAL_STEPS", 2)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("method", METHODS)
def test_keeping_everything_gives_the_weights_back(method: str) -> None:
    (kept,) = METHODS[method]([layer()], 1.0)
    for exact, stack in zip(layer().stacks, kept.stacks, strict=True):
        torch.testing.assert_close(stack, exact)
    assert kept.stored == layer().dense


@pytest.mark.parametrize("keep", [0.75, 0.5])
@pytest.mark.parametrize("method", METHODS)
def test_stored_numbers_are_within_the_budget_and_use_it(method: str, keep: float) -> None:
    layers = [layer(0), layer(1)]
    compressed = METHODS[method](layers, keep)
    total = sum(part.numel() for one in compressed for part in one.parts)
    budget = keep * sum(one.dense for one in layers)
    assert sum(one.stored for one in compressed) == total <= budget
    # One step of the coarsest granularity: a rank that all experts share, or an expert.
    step = 2 * (3 * EXPERTS * INTERMEDIATE + 4 * HIDDEN)
    assert total >= budget - max(step, layers[0].dense // EXPERTS)


@pytest.mark.parametrize("method", METHODS)
def test_weights_in_effect_are_worth_something(method: str) -> None:
    (compressed,) = METHODS[method]([layer()], 0.75)
    assert all(stack.dtype == torch.float32 for stack in compressed.stacks)
    if compressed.kept_experts is None:
        assert output_error(layer(), compressed) < 0.75
    else:  # experts are gone, and the others as they were
        kept = list(compressed.kept_experts)
        assert len(kept) == int(0.75 * EXPERTS)
        for stack, exact in zip(compressed.stacks, layer().stacks, strict=True):
            assert torch.equal(stack[kept], exact[kept])


def test_full_rank_gives_the_weights_back_through_whitening() -> None:
    gate, _, _ = layer().stacks
    spectrum = low_rank.spectrum(gate, layer().input_moments())
    back, factors = spectrum.truncate([INTERMEDIATE] * EXPERTS)
    torch.testing.assert_close(back, gate, rtol=1e-4, atol=1e-5)
    assert sum(f.numel() for f in factors) == EXPERTS * INTERMEDIATE * (INTERMEDIATE + HIDDEN)


def test_td_moe_with_a_full_budget_gives_the_weights_back_through_whitening() -> None:
    gate, _, _ = layer().stacks
    white = tucker._white_on_hidden(gate, layer().input_moments(), keep=1.0)
    back = torch.stack(list(white.expand_slices()))
    torch.testing.assert_close(back, gate, rtol=1e-4, atol=1e-5)
    assert white.U_H is None
    assert white.U_I is None


def test_whitening_lowers_the_error_on_the_tokens() -> None:
    gate, _, _ = layer().stacks
    ranks = [8] * EXPERTS
    plain, _ = low_rank.spectrum(gate).truncate(ranks)
    white, _ = low_rank.spectrum(gate, layer().input_moments()).truncate(ranks)
    for expert, (x, _) in enumerate(layer().tokens):
        errors = [(x @ (gate[expert] - one[expert]).T).norm() for one in (plain, white)]
        assert errors[1] < 0.8 * errors[0]


def test_roots_of_singular_moments_are_finite_inverses() -> None:
    x = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0)).double()
    root, inverse = roots(x.mT @ x)
    eye = torch.eye(12, dtype=torch.float64).expand(3, -1, -1)
    torch.testing.assert_close(root @ inverse, eye, rtol=1e-6, atol=1e-6)
    none, also = roots(torch.cat((torch.zeros(1, 12, 12).double(), x.mT @ x)))
    assert torch.isfinite(none).all()
    assert torch.isfinite(also).all()


def test_latent_factor_is_shared_and_counted_once() -> None:
    compressed = tucker._latent(layer(), 0.6, ((0, 1), (2,)), (0.6, 0.6, 0.6))
    gate, up, _ = compressed.stacks
    together = torch.cat((gate, up)).flatten(0, 1)
    assert torch.linalg.matrix_rank(together, rtol=1e-5) < HIDDEN
    assert len({id(part) for part in compressed.parts}) == len(compressed.parts) == 5


def test_compensation_lowers_the_output_error_of_the_same_neurons() -> None:
    chosen = [torch.arange(0, INTERMEDIATE, 2)] * EXPERTS
    plain = pruning.narrowed(layer(), chosen)
    refitted = pruning.narrowed(layer(), chosen, layer().activation_moments(weighted=True))
    assert plain.stored == refitted.stored
    assert output_error(layer(), refitted) < output_error(layer(), plain)


def test_compensation_of_a_neuron_that_repeats_another_is_exact() -> None:
    gate, up, down = (stack.clone() for stack in layer().stacks)
    gate[:, 1], up[:, 1] = gate[:, 0], up[:, 0]
    twin = replace(layer(), stacks=(gate, up, down))
    rows = [torch.tensor([0, *range(2, INTERMEDIATE)])] * EXPERTS
    refitted = pruning.narrowed(twin, rows, twin.activation_moments(weighted=True))
    assert output_error(twin, refitted) < 1e-3


def test_elimination_takes_a_repeated_neuron_first() -> None:
    gate, up, down = (stack.clone() for stack in layer().stacks)
    gate[:, 1], up[:, 1] = gate[:, 0], up[:, 0]
    twin = replace(layer(), stacks=(gate, up, down))
    moment = twin.activation_moments(weighted=True)[0]
    costs = pruning._elimination_costs(moment, down[0])
    assert int(costs.argmin()) in (0, 1)
    assert len(set(costs.tolist())) == INTERMEDIATE


def test_reap_leaves_the_router_as_many_experts_as_it_stores() -> None:
    compressed = pruning.reap([layer(0), layer(1)], 0.6)
    kept = [one.kept_experts for one in compressed]
    assert sum(len(experts or ()) for experts in kept) == int(0.6 * 2 * EXPERTS)
    for one in compressed:
        gone = sorted(set(range(EXPERTS)) - set(one.kept_experts or ()))
        assert not one.stacks[0][gone].any()


def test_heapr_deals_out_one_budget_over_the_layers() -> None:
    loud = layer(1)
    loud = replace(loud, stacks=(loud.stacks[0], loud.stacks[1], 3 * loud.stacks[2]))
    quiet, more = pruning.heapr([layer(0), loud], 0.5)
    assert quiet.stored < more.stored


@pytest.mark.parametrize("count", [2, 13, 24])
def test_covering_sizes_are_those_of_a_search_for_the_share(count: int) -> None:
    g = torch.Generator().manual_seed(count)
    gains = [torch.rand(10, generator=g).double().sort(descending=True).values for _ in range(3)]
    weights = torch.rand(3, generator=g).double() + 0.1

    def sizes(share: float) -> list[int]:
        """As published: the fewest steps that gain min(s w, 1) of all that a part could."""
        wanted = [
            min(share * float(w), 1.0) * gain.sum() for gain, w in zip(gains, weights, strict=True)
        ]
        return [
            min(int(torch.searchsorted(gain.cumsum(0), want)) + 1, len(gain))
            for gain, want in zip(gains, wanted, strict=True)
        ]

    shares = torch.linspace(0, 1 / float(weights.min()), 2001).tolist()
    within = [found for found in map(sizes, shares) if sum(found) <= count]
    found = covering_sizes(count, gains, weights)
    assert sum(found) == count
    if within:  # at least one step of every part
        assert all(0 <= own - low <= 1 for own, low in zip(found, within[-1], strict=True))


def test_attribution_of_channels_and_experts_is_that_of_autograd() -> None:
    one = layer()
    assert one.decoder_norms_T is not None
    inner = [
        torch.stack((x @ gate.T, x @ up.T)).requires_grad_()
        for (x, _), gate, up in zip(one.tokens, one.stacks[0], one.stacks[1], strict=True)
    ]
    active = [torch.nn.functional.silu(gate) * up for gate, up in inner]
    for own in active:
        own.retain_grad()
    scales = torch.full((EXPERTS,), 0.9, requires_grad=True)
    routed = torch.zeros_like(one.x_TI)
    for expert, (_, weights) in enumerate(one.tokens):
        output = scales[expert] * active[expert] @ one.stacks[2][expert] * weights[:, None]
        rows = (one.experts_Tk == expert).any(-1).nonzero()[:, 0]
        routed = routed.index_add(0, rows, output)
    loss = (one.output - routed).square().sum(-1) / one.decoder_norms_T.square()
    torch.autograd.backward(loss.sum())
    assert scales.grad is not None
    saliency = slimming._Saliency(one)
    torch.testing.assert_close(loss.mean().item() * 100, saliency.loss, rtol=1e-3, atol=0)
    torch.testing.assert_close(-scales.grad / TOKENS / 0.2, saliency.experts, rtol=1e-3, atol=1e-6)
    for expert, both in enumerate(inner):
        slopes = both.grad, active[expert].grad
        assert slopes[0] is not None
        assert slopes[1] is not None
        parts = (*(both * slopes[0]), active[expert] * slopes[1])
        mean = sum(part.abs().mean(0) for part in parts) / 3
        mine = saliency.channels["attribution"][expert] * 0.2 * 0.9
        torch.testing.assert_close(mine, mean, rtol=1e-3, atol=1e-6)


def test_barycentre_of_experts_in_other_orders_is_the_expert() -> None:
    g = torch.Generator().manual_seed(0)
    points = torch.randn(INTERMEDIATE, 3 * HIDDEN, generator=g)
    orders = torch.stack([torch.randperm(INTERMEDIATE, generator=g) for _ in range(EXPERTS)])
    shared, found = parser.barycentre(points[orders])
    for order, back in zip(orders, found, strict=True):
        torch.testing.assert_close(points[order][back], shared)


def test_errors_of_shared_neurons_are_those_of_the_expert_without_its_own() -> None:
    one = layer()
    shared = triple(stack.mean(0) for stack in one.stacks)
    errors = parser._output_errors(one, one.stacks, shared, routed=False)
    for neuron in (0, INTERMEDIATE - 1):
        stacks = tuple(stack.clone() for stack in one.stacks)
        for stack, common in zip(stacks, shared, strict=True):
            stack[0, neuron] = common[neuron]
        x, _ = one.tokens[0]
        outputs = [
            (torch.nn.functional.silu(x @ gate[0].T) * (x @ up[0].T)) @ down[0]
            for gate, up, down in (one.stacks, stacks)
        ]
        expected = (outputs[0] - outputs[1]).square().sum(-1).mean()
        torch.testing.assert_close(errors[0, neuron], expected, rtol=1e-3, atol=1e-6)


def test_residuals_are_kept_where_experts_differ() -> None:
    stacks = [stack[:1].repeat(EXPERTS, 1, 1) for stack in layer().stacks]
    odd = 7
    for stack in stacks:
        stack[2, odd] = 3 * stack[2, odd].flip(-1)
    alike = replace(layer(), stacks=(stacks[0], stacks[1], stacks[2]))
    (found,) = parser.parser([alike], (1 + 4 * EXPERTS / INTERMEDIATE) / EXPERTS)
    assert found.shared_EH is not None
    assert not found.shared_EH[2, odd]
    assert output_error(alike, found) < 1e-2


def test_bases_of_a_mixture_are_found() -> None:
    g = torch.Generator().manual_seed(0)
    bases = torch.randn(2, 5, 24, generator=g)
    alpha = torch.rand(EXPERTS, 2, generator=g)
    outer = torch.randn(EXPERTS, 16, 5, generator=g)
    target = outer @ torch.einsum("ej,jrn->ern", alpha, bases)
    target /= target.std()
    start = mobe.first_bases(target, 2, 5)
    before, after = (mobe.fit_bases(target, start, torch.tanh, steps) for steps in (1, 60))
    assert (after.stack - target).norm() < 0.75 * (before.stack - target).norm()


def test_slbf_finds_factors_inside_the_activation() -> None:
    g = torch.Generator().manual_seed(0)
    outer, inner = (
        torch.randn(EXPERTS, 20, 3, generator=g),
        torch.randn(EXPERTS, 3, 24, generator=g),
    )
    target = torch.randn(EXPERTS, 20, 20, generator=g) @ torch.nn.functional.silu(outer @ inner)
    target /= target.std()
    start = slbf.first_bases(target, 20, 3)
    before, after = (mobe.fit_bases(target, start, torch.nn.functional.silu, n) for n in (1, 200))
    assert (after.stack - target).norm() < 0.5 * (before.stack - target).norm()
    assert [part.numel() for part in after.parts] == [EXPERTS * n for n in (400, 60, 72, EXPERTS)]


def test_rounded_factors_are_near_and_all_their_bits_are_counted() -> None:
    (found,) = slbf.slbf([layer()], 0.6)
    assert found.rounded is not None
    for bits, most in ((8, 0.02), (4, 0.25)):
        encoding = Encoding(bits, 32, zero=False)
        stacks, stored = found.rounded(encoding)
        for rounded, stack in zip(stacks, found.stacks, strict=True):
            assert 0 < (rounded - stack).norm() < most * stack.norm()
        # A, U and V of every projection, and its alpha.
        values = [part for n, part in enumerate(found.parts) if n % 4 != 3]
        groups = sum(-(-part.shape[-1] // 32) * part.shape[:-1].numel() for part in values)
        alphas = sum(found.parts[n].numel() for n in (3, 7, 11))
        assert stored == bits * sum(map(torch.numel, values)) + 16 * (groups + alphas)


def test_budget_is_dealt_out_to_the_last_step() -> None:
    gains = [torch.tensor([9.0, 1.0, 0.5]), torch.tensor([5.0, 4.0, 3.0])]
    assert equal_sizes(3 * 7 + 2, 7, gains) == [1, 2]
    assert pooled_sizes(4 * 7, 7, gains) == [1, 3]
    assert equal_sizes(100 * 7, 7, gains) == [3, 3]
    assert [c.tolist() for c in largest(gains, 2)] == [[0], [0]]


def test_stored_counts_every_part() -> None:
    parts = (torch.zeros(3, 4), torch.zeros(5))
    assert Compressed(layer().stacks, parts).stored == 17

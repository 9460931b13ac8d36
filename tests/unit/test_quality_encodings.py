"""Laws of quantisation alone in benchmarks/quality, and of our own beside it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.quality.divergence import divergence, predict
from benchmarks.quality.encodings import Encoding, descended, gptq, round_to_nearest
from benchmarks.quality.layer import Compressed, Stacks, dense
from benchmarks.quality.learned import learn
from benchmarks.quality.methods.pruning import equally_eliminated_neurons
from benchmarks.quality.models import MoeModel
from benchmarks.quality.quantised import quantise as quantise_layers
from benchmarks.quality.registry import METHODS
from tests.tiny_models import add_tokenizer, make_tiny_model
from tuckerize.domain import CoreType
from tuckerize.linalg.quantise import quantise

ENCODINGS = st.builds(
    Encoding,
    bits=st.sampled_from([2, 3, 4, 5, 8]),
    group=st.sampled_from([None, 8, 32]),
    zero=st.booleans(),
)


def matrices(seed: int, outputs: int = 6, inputs: int = 40) -> tuple[Tensor, Tensor]:
    """Three matrices, and moments of inputs in few directions."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 200, inputs, generator=g) * torch.logspace(0, -2, inputs)
    x = x @ torch.linalg.qr(torch.randn(inputs, inputs, generator=g))[0]
    return torch.randn(3, outputs, inputs, generator=g), x.mT @ x


def missed(matrices_EOK: Tensor, values_EOK: Tensor, moments_EKK: Tensor) -> Tensor:
    """Squared error of every output on the moments, (E, O), by a loop in float64."""
    found = [
        [difference_K @ moment_KK.double() @ difference_K for difference_K in difference_OK]
        for difference_OK, moment_KK in zip(
            (matrices_EOK - values_EOK).double(), moments_EKK, strict=True
        )
    ]
    return torch.tensor(found)


@settings(max_examples=20, deadline=None)
@given(ENCODINGS, st.integers(0, 9))
def test_values_have_as_many_levels_as_the_bits_tell(encoding: Encoding, seed: int) -> None:
    matrices_EOK, moments_EKK = matrices(seed)
    group = encoding.group or 40
    for method in (round_to_nearest, gptq, descended):
        values = method(matrices_EOK, encoding, moments_EKK).values
        for part in torch.split(values, group, dim=-1):
            assert all(len(row.unique()) <= 2**encoding.bits for row in part.flatten(0, 1))


@settings(max_examples=20, deadline=None)
@given(ENCODINGS, st.integers(0, 9))
def test_gptq_and_descent_are_nowhere_worse(encoding: Encoding, seed: int) -> None:
    matrices_EOK, moments_EKK = matrices(seed)
    nearest, better, best = (
        missed(matrices_EOK, method(matrices_EOK, encoding, moments_EKK).values, moments_EKK)
        for method in (round_to_nearest, gptq, descended)
    )
    assert (best <= better * (1 + 1e-3)).all()
    assert (better <= nearest * (1 + 1e-3)).all()
    if encoding.bits <= 4:
        assert better.sum() < 0.9 * nearest.sum()


@given(ENCODINGS, st.integers(1, 50), st.integers(0, 100))
def test_every_stored_bit_is_counted(encoding: Encoding, outputs: int, inputs: int) -> None:
    group = encoding.group or max(inputs, 1)
    counted = sum(
        encoding.bits * min(group, inputs - start) + 16 + encoding.bits * encoding.zero
        for _ in range(outputs)
        for start in range(0, inputs, group)
    )
    assert encoding.stored_bits(outputs, inputs) == counted


@pytest.mark.parametrize("core_type", [CoreType.W8, CoreType.W4])
def test_our_own_is_as_good_as_the_competitor(core_type: CoreType) -> None:
    encoding = Encoding(core_type.bits, core_type.group_size, zero=False)
    matrices_EOK, moments_EKK = matrices(0, outputs=64, inputs=64)
    found = gptq(matrices_EOK, encoding, moments_EKK).values
    theirs = missed(matrices_EOK, found, moments_EKK).sum()
    own = quantise(matrices_EOK, core_type, list(moments_EKK)).dequantised()
    assert float(missed(matrices_EOK, own, moments_EKK).sum()) == pytest.approx(
        float(theirs), rel=0.1
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> MoeModel:
    """Random experts of 24 neurons, 8 in each of 2 layers."""
    return MoeModel(add_tokenizer(make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")))


@pytest.mark.parametrize("bits", [8, 3])
def test_quantised_model_is_as_near_as_its_bits_allow(tiny: MoeModel, bits: int) -> None:
    tokens = torch.randint(0, 60, (1025,), generator=torch.Generator().manual_seed(0))
    before = predict(tiny, tokens)
    layers = tiny.layers(tokens)
    encoding = Encoding(bits, 32, zero=False)
    stored = quantise_layers(tiny, [dense(layer) for layer in layers], tokens, encoding, "GPTQ")
    found = divergence(tiny, tokens, before)
    tiny.restore()
    # per expert two matrices (24, 32) and one (32, 24), each output with one group of inputs
    assert stored == 2 * 8 * (3 * 24 * 32 * bits + 16 * (24 + 24 + 32))
    assert 0 < found["kl"] < {8: 1e-6, 3: 1e-2}[bits]
    assert divergence(tiny, tokens, before)["kl"] == 0


def test_learned_rounding_is_nearer_and_of_as_many_levels(tiny: MoeModel) -> None:
    encoding = Encoding(2, 8, zero=True)
    tokens = torch.randint(0, 60, (8193,), generator=torch.Generator().manual_seed(0))
    layer = tiny.layers(tokens)[0]
    gate, up, down = layer.stacks
    matrices = [gate, up, down.mT.contiguous()]
    none = torch.empty(0)
    nearest = [round_to_nearest(own, encoding, none) for own in matrices]
    learned = learn(layer, matrices, nearest, encoding, steps=75)

    def error(stacks: Stacks) -> float:
        return float((layer.output_of(stacks) - layer.output).norm())

    start = [own.values for own in nearest]
    assert error(learned) < 0.95 * error((start[0], start[1], start[2].mT))
    for values in (learned[0], learned[1], learned[2].mT):
        for part in torch.split(values, 8, dim=-1):
            assert all(len(row.unique()) <= 4 for row in part.flatten(0, 1))


def test_shared_neurons_are_stored_once_and_rounded_alike(tiny: MoeModel) -> None:
    tokens = torch.randint(0, 60, (1025,), generator=torch.Generator().manual_seed(0))
    layers = tiny.layers(tokens)
    encoding = Encoding(4, 32, zero=False)
    compressed = METHODS["PARSER"](layers, 0.5)
    stored = quantise_layers(tiny, compressed, tokens, encoding, "GPTQ")
    after = tiny.layers(tokens)
    tiny.restore()
    expected = 0
    for own, layer in zip(compressed, after, strict=True):
        assert own.shared_EH is not None
        for stack in layer.stacks:
            for neuron, readers in enumerate(own.shared_EH.T):
                assert all(torch.equal(a, b) for a, b in pairwise(stack[readers, neuron]))
        used = int(own.shared_EH.any(0).sum())
        for width in (*(~own.shared_EH).sum(1).tolist(), used):
            expected += 2 * encoding.stored_bits(width, 32) + encoding.stored_bits(32, width)
        exact, near = own.stacks[0], layer.stacks[0]
        assert 0 < float((near - exact).norm() / exact.norm()) < 0.2
    assert stored == expected


def test_neurons_and_experts_that_are_gone_are_not_stored(tiny: MoeModel) -> None:
    tokens = torch.randint(0, 60, (1025,), generator=torch.Generator().manual_seed(0))
    layers = tiny.layers(tokens)
    encoding = Encoding(4, 32, zero=False)
    narrow = equally_eliminated_neurons(layers, 0.7)
    stored = quantise_layers(tiny, narrow, tokens, encoding, "RTN")
    assert stored == 2 * 8 * (3 * 16 * 32 * 4 + 16 * (16 + 16 + 32))
    fewer = METHODS["REAP"](layers, 0.5)
    stored = quantise_layers(tiny, fewer, tokens, encoding, "RTN")
    tiny.restore()
    assert stored == 2 * 4 * (3 * 24 * 32 * 4 + 16 * (24 + 24 + 32))


def test_a_latent_space_is_stored_once_and_gate_and_up_are_rounded_in_it(tiny: MoeModel) -> None:
    tokens = torch.randint(0, 60, (1025,), generator=torch.Generator().manual_seed(0))
    layers = tiny.layers(tokens)
    encoding = Encoding(4, 8, zero=False)
    drawn = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    basis_IR = torch.linalg.qr(drawn)[0]
    projection_II = basis_IR @ basis_IR.T
    compressed = []
    for layer in layers:
        gate, up, down = layer.stacks
        stacks = (gate @ projection_II, up @ projection_II, down)
        compressed.append(Compressed(stacks, stacks, basis_IR=basis_IR))
    stored = quantise_layers(tiny, compressed, tokens, encoding, "GPTQ")
    after = tiny.layers(tokens)
    tiny.restore()
    for own, layer in zip(compressed, after, strict=True):
        for exact, near in zip(own.stacks[:2], layer.stacks[:2], strict=True):
            torch.testing.assert_close(near @ projection_II, near)
            assert 0 < float((near - exact).norm() / exact.norm()) < 0.2
    experts, neurons, hidden = layers[0].shape
    per_expert = 2 * encoding.stored_bits(neurons, 16) + encoding.stored_bits(hidden, neurons)
    assert stored == len(layers) * (experts * per_expert + 16 * 32 * 16)

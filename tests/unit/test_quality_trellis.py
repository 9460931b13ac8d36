"""Trellis codes of benchmarks/quality: the path against all paths, distortion, what is stored."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.quality import trellis
from benchmarks.quality.encodings import Encoding, gptq
from benchmarks.quality.trellis import Trellis, nearest_path, numbers, trellis_coded


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 3))
def test_the_path_is_the_nearest_of_all(seed: int, bits: int, length: int) -> None:
    wanted_ET = torch.randn(2, length, generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trellis, "_STATE_BITS", 4)
        number_S = numbers()
        found_ET = nearest_path(wanted_ET, bits)
    paths = []
    for state, moves in product(range(16), product(range(2**bits), repeat=length - 1)):
        states = [state]
        for move in moves:
            states.append((states[-1] * 2**bits + move) % 16)
        paths.append(number_S[states])
    for wanted_T, found_T in zip(wanted_ET, found_ET, strict=True):
        errors = [float((path_T - wanted_T).square().sum()) for path_T in paths]
        assert float((found_T - wanted_T).square().sum()) == pytest.approx(min(errors))
        assert any(torch.equal(path_T, found_T) for path_T in paths)


@pytest.fixture
def few_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """States of 10 bits, for which nothing is compiled."""
    monkeypatch.setattr(trellis, "_STATE_BITS", 10)


@pytest.mark.usefixtures("few_states")
def test_little_more_is_missed_of_normal_values_than_must_be() -> None:
    wanted_ET = torch.randn(8, 512, generator=torch.Generator().manual_seed(1))
    for bits, most in ((2, 0.082), (3, 0.024)):
        missed_ET = nearest_path(wanted_ET, bits) - wanted_ET
        share = float(missed_ET.square().sum() / wanted_ET.square().sum())
        assert 4**-bits < share < most


@pytest.mark.usefixtures("few_states")
def test_it_loses_less_than_gptq_of_half_a_bit_more() -> None:
    g = torch.Generator().manual_seed(0)
    x_ENK = torch.randn(2, 400, 64, generator=g) * torch.logspace(0, -1, 64)
    x_ENK = x_ENK @ torch.linalg.qr(torch.randn(64, 64, generator=g))[0]
    moments_EKK = x_ENK.mT @ x_ENK
    matrices_EOK = torch.randn(2, 48, 64, generator=g)
    wider = Encoding(2, 32, zero=False)
    coded = trellis_coded(matrices_EOK, Trellis(2), moments_EKK)
    blind = trellis_coded(matrices_EOK, Trellis(2), torch.eye(64).expand(2, 64, 64))
    rounded = gptq(matrices_EOK, wider, moments_EKK).values
    coded_error, blind_error, rounded_error = (
        float(((matrices_EOK - values_EOK) @ x_ENK.mT).square().sum())
        for values_EOK in (coded, blind, rounded)
    )
    assert coded_error < 0.8 * rounded_error
    assert coded_error < 0.9 * blind_error
    # Eight sequences of 48 × 8 values begin with 10 bits in place of 2; one scale.
    assert Trellis(2).stored_bits(48, 64) == 48 * 64 * 2 + 8 * 8 + 16
    assert wider.stored_bits(48, 64) > 48 * 64 * 2.4


@pytest.mark.usefixtures("few_states")
def test_padding_is_not_coded() -> None:
    g = torch.Generator().manual_seed(0)
    narrow_EOK, moments_EKK = torch.randn(1, 20, 24, generator=g), torch.eye(32)[None]
    wide_EOK = torch.zeros(3, 32, 32)
    wide_EOK[1, :20, :24] = narrow_EOK[0]
    wide_EOK[2] = torch.randn(32, 32, generator=g)
    found_EOK = trellis_coded(wide_EOK, Trellis(3), moments_EKK.expand(3, 32, 32))
    alone_EOK = trellis_coded(narrow_EOK, Trellis(3), moments_EKK[:, :24, :24])
    torch.testing.assert_close(found_EOK[1, :20, :24], alone_EOK[0])
    assert not found_EOK[0].any()
    assert not found_EOK[1, 20:].any()
    assert not found_EOK[1, :, 24:].any()
    assert Trellis(3).stored_bits(0, 32) == 0

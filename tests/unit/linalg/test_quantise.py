"""Quantisation against compressed-tensors' packing, a naive GPTQ in float64, and its own laws."""

from __future__ import annotations

import importlib.util
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from torch import Tensor
from torch.nn import functional

from tests.live_tensors import live_bytes
from tuckerize.domain import CoreType
from tuckerize.linalg.packing import pack, unpack
from tuckerize.linalg.quantise import (
    Inputs,
    QuantisedMatrices,
    code_dtype,
    fit_scales,
    gptq,
    quantise,
)


def packing() -> Any:  # noqa: ANN401
    """The module that packs in compressed-tensors, whose whole takes long to import."""
    package = importlib.util.find_spec("compressed_tensors")
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).parent / "compressors" / "pack_quantized" / "helpers.py"
    spec = importlib.util.spec_from_file_location("packing", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PACKING = packing()

core_types = st.sampled_from(CoreType)
# Codes of 3 bits: releases before 0.20 leave two bits of a word empty.
IS_DENSE = Version(version("compressed-tensors")) >= Version("0.20")
packed = st.sampled_from([CoreType.W4, CoreType.W3] if IS_DENSE else [CoreType.W4])


def nearest(values: Tensor, core_type: CoreType) -> Tensor:
    """Nearest codes: integers, or those of torch's float8."""
    within = values.clamp(*core_type.code_range)
    if core_type == CoreType.FP8:
        return within.to(torch.float8_e4m3fn).to(values.dtype)
    return within.round()


def normal(*sizes: int, seed: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def moments(experts: int, columns: int, *, tokens: int, seed: int) -> Tensor:
    """Second moments of correlated inputs of uneven energy, shape (E, K, K)."""
    mixing = normal(columns, columns, seed=seed) * torch.logspace(0, -2, columns)[:, None]
    inputs = normal(experts, tokens, columns, seed=seed + 1) @ mixing
    return inputs.mT @ inputs


def weighted_error(matrix_OK: Tensor, found: QuantisedMatrices, moment_KK: Tensor) -> Tensor:
    """Squared error of every output, summed over the inputs of a second moment, shape (O,)."""
    missed_OK = matrix_OK.double() - found.dequantised(torch.float64)
    return ((missed_OK @ moment_KK.double()) * missed_OK).sum(-1)


def total_error(matrices: Tensor, found: QuantisedMatrices, moments_EKK: Tensor) -> Tensor:
    """Weighted squared error of every output, shape (E, O)."""
    return torch.stack([
        weighted_error(m, QuantisedMatrices(c, s, found.core_type), h)
        for m, c, s, h in zip(matrices, found.codes, found.scales, moments_EKK, strict=True)
    ])  # fmt: skip


@settings(deadline=None)
@given(core_type=packed, columns=st.integers(1, 70), seed=st.integers(0, 99))
def test_packing_is_that_of_compressed_tensors(
    core_type: CoreType, columns: int, seed: int
) -> None:
    low, high = core_type.code_range
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(low, high + 1, (2, 3, columns), generator=generator).to(torch.int8)
    words = pack(codes, core_type)
    assert words.shape[-1] == core_type.words(columns)
    assert torch.equal(unpack(words, core_type, columns), codes)
    # What fills the last word up is free; codes of 3 bits fill words of theirs in groups of 32.
    padded = functional.pad(codes, (0, -columns % 32))
    theirs = PACKING.pack_to_int32(padded, core_type.bits)
    assert torch.equal(pack(padded, core_type).view(torch.int32), theirs)
    assert torch.equal(PACKING.unpack_from_int32(theirs, core_type.bits, padded.shape), padded)


@pytest.mark.parametrize("core_type", [CoreType.W4, CoreType.W3])
def test_packing_takes_little_more_than_its_result(
    core_type: CoreType, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = torch.randint(-4, 4, (64, 256, 64), dtype=torch.int8)
    expected = pack(codes, core_type)
    monkeypatch.setattr("tuckerize.linalg.packing._PACKED_VALUES", 2**12)
    assert torch.equal(pack(codes, core_type), expected)
    result = expected.numel() * expected.element_size()
    assert live_bytes(lambda: pack(codes, core_type)) < 2.3 * result
    assert pack(codes[:0], core_type).shape == (0, *expected.shape[1:])


@settings(max_examples=30, deadline=None)
@given(
    core_type=core_types,
    columns=st.integers(1, 70),
    tokens=st.integers(1, 90),
    seed=st.integers(0, 999),
)
def test_fitted_scales_never_make_an_output_worse(
    core_type: CoreType, columns: int, tokens: int, seed: int
) -> None:
    (matrix_OK,) = normal(1, 5, columns, seed=seed)
    (moment_KK,) = moments(1, columns, tokens=tokens, seed=seed)
    given_ = quantise(matrix_OK[None], core_type).of_expert(0)
    fitted_OG = fit_scales(matrix_OK, given_.codes, given_.scales, moment_KK, core_type)
    before, after = (
        weighted_error(matrix_OK, QuantisedMatrices(given_.codes, scales_OG, core_type), moment_KK)
        for scales_OG in (given_.scales, fitted_OG)
    )
    assert (after <= before * (1 + 1e-3) + 1e-6 * float(moment_KK.trace())).all()


@pytest.mark.parametrize("core_type", [CoreType.W4, CoreType.W3])
def test_fitted_scales_are_those_of_least_squares(core_type: CoreType) -> None:
    columns = 5 * 32
    matrix_OK = normal(4, columns, seed=0)
    inputs_NK = normal(400, columns, seed=1) @ normal(columns, columns, seed=2)
    found = quantise(matrix_OK[None], core_type, scale_dtype=torch.float32).of_expert(0)
    fitted_OG = fit_scales(matrix_OK, found.codes, found.scales, inputs_NK.T @ inputs_NK, core_type)
    for row_K, codes_K, scales_G in zip(matrix_OK, found.codes, fitted_OG, strict=True):
        parts_NG = (inputs_NK * codes_K).view(400, 5, 32).sum(-1).double()
        expected_G = torch.linalg.lstsq(parts_NG, (inputs_NK @ row_K).double()[:, None]).solution
        torch.testing.assert_close(scales_G.double(), expected_G[:, 0], rtol=1e-3, atol=1e-4)


def test_scales_of_many_groups_are_solved_on_several_threads() -> None:
    """The batched LU of MKL fails there: 224 groups, of hidden size 7168, on two threads."""
    matrix_OK = normal(16, 224 * 32, seed=0)
    found = quantise(matrix_OK[None], CoreType.W4, scale_dtype=torch.float32).of_expert(0)
    moment_KK = torch.diag(normal(224 * 32, seed=1).square())
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fitted_OG = fit_scales(matrix_OK, found.codes, found.scales, moment_KK, CoreType.W4)
    finally:
        torch.set_num_threads(before)
    codes, values = (own.view(16, 224, 32) for own in (found.codes.double(), matrix_OK.double()))
    weight = moment_KK.diagonal().double().view(224, 32)
    expected = (weight * codes * values).sum(-1) / (weight * codes.square()).sum(-1)
    torch.testing.assert_close(fitted_OG.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("core_type", CoreType)
def test_inputs_help_much_where_they_are_uneven(core_type: CoreType) -> None:
    matrices, moments_EKK = normal(2, 24, 96, seed=0), moments(2, 96, tokens=300, seed=1)
    nearest = total_error(matrices, quantise(matrices, core_type), moments_EKK).sum()
    found = total_error(matrices, quantise(matrices, core_type, list(moments_EKK)), moments_EKK)
    assert found.sum() < 0.5 * nearest


@settings(max_examples=30, deadline=None)
@given(core_type=core_types, columns=st.integers(1, 70), seed=st.integers(0, 999))
def test_values_on_a_grid_come_out_exactly(core_type: CoreType, columns: int, seed: int) -> None:
    """Codes that reach the last one, times scales that have 16 bits."""
    low, high = core_type.code_range
    group = core_type.group_size or columns
    groups = math.ceil(columns / group)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(low, high + 1, (1, 4, columns), generator=generator).float()
    codes = nearest(codes, core_type)
    codes[..., ::group] = low
    scales = normal(1, 4, groups, seed=seed).bfloat16()
    matrices = QuantisedMatrices(codes.to(code_dtype(core_type)), scales, core_type).dequantised()
    found = quantise(matrices, core_type)
    assert found.scales.dtype == torch.bfloat16
    assert found.scales.shape == scales.shape
    assert torch.equal(found.dequantised(), matrices)


@settings(max_examples=30, deadline=None)
@given(core_type=core_types, columns=st.integers(1, 70), seed=st.integers(0, 999))
def test_rounding_to_nearest_is_better_than_the_largest_magnitude_as_scale(
    core_type: CoreType, columns: int, seed: int
) -> None:
    matrix = normal(1, 3, columns, seed=seed)
    group, (_, high) = core_type.group_size or columns, core_type.code_range
    expected = torch.zeros_like(matrix)
    for start in range(0, columns, group):
        part = matrix[..., start : start + group]
        scale = part.abs().amax(-1, keepdim=True) / high
        expected[..., start : start + group] = nearest(part / scale, core_type) * scale
    found = quantise(matrix, core_type, scale_dtype=torch.float32)
    missed = (found.dequantised() - matrix).square().sum(-1)
    assert (missed <= (expected - matrix).square().sum(-1) * (1 + 1e-4) + 1e-12).all()


def naive_gptq(
    matrix_OK: Tensor, scales_OK: Tensor, moment_KK: Tensor, core_type: CoreType
) -> Tensor:
    """Optimal brain quantisation in float64: the inverse of what is left, for every column."""
    left_OK, codes_OK = matrix_OK.double().clone(), torch.zeros_like(matrix_OK)
    damped_KK = moment_KK.double()
    damped_KK = damped_KK + 0.01 * damped_KK.diagonal().mean() * torch.eye(len(damped_KK))
    rest = damped_KK.diagonal().argsort(descending=True, stable=True).tolist()
    while rest:
        k, inverse = rest[0], torch.linalg.inv(damped_KK[rest][:, rest])
        code_O = nearest(left_OK[:, k] / scales_OK[:, k], core_type)
        codes_OK[:, k] = code_O
        missed_O = (left_OK[:, k] - code_O * scales_OK[:, k]) / inverse[0, 0]
        left_OK[:, rest] -= missed_O[:, None] * inverse[0]
        rest = rest[1:]
    return codes_OK


@pytest.mark.parametrize("core_type", CoreType)
@pytest.mark.parametrize("columns", [7, 32, 150])
def test_gptq_is_that_of_a_naive_loop(core_type: CoreType, columns: int) -> None:
    matrix_OK = normal(24, columns, seed=3)
    (moment_KK,) = moments(1, columns, tokens=4 * columns, seed=4)
    scales_OG = quantise(matrix_OK[None], core_type).scales[0]
    codes_OK = gptq(matrix_OK, scales_OG, Inputs.of(moment_KK), core_type)
    scales_OK = scales_OG.double().repeat_interleave(core_type.group_size or columns, -1)
    expected_OK = naive_gptq(matrix_OK, scales_OK[:, :columns], moment_KK, core_type)
    # A value halfway between two codes may go either way, and others follow it.
    assert (codes_OK.float() != expected_OK).float().mean() < 0.02
    ours, naive = (
        weighted_error(matrix_OK, QuantisedMatrices(codes, scales_OG, core_type), moment_KK)
        for codes in (codes_OK, expected_OK)
    )
    torch.testing.assert_close(ours.sum(), naive.sum(), rtol=0.02, atol=0)


@pytest.mark.parametrize("core_type", CoreType)
@pytest.mark.parametrize("size", [1e-37, 1e30])
def test_inputs_of_any_size_give_the_same_codes(core_type: CoreType, size: float) -> None:
    matrices, moments_EKK = normal(1, 24, 96, seed=0), moments(1, 96, tokens=300, seed=1)
    expected = quantise(matrices, core_type, list(moments_EKK))
    found = quantise(matrices, core_type, list(size * moments_EKK))
    assert (found.codes.float() != expected.codes.float()).float().mean() < 0.02


@pytest.mark.parametrize("core_type", CoreType)
@pytest.mark.parametrize("with_inputs", [True, False])
def test_zeros_stay_zero(core_type: CoreType, with_inputs: bool) -> None:
    zeros, unseen = torch.zeros(1, 3, 40), [torch.zeros(40, 40)] if with_inputs else None
    found = quantise(zeros, core_type, unseen)
    assert not found.dequantised().any()
    assert found.scales.isfinite().all()


def test_scales_of_some_outputs_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large matrices are treated some outputs at a time."""
    matrix_OK = normal(24, 96, seed=0)
    moment_KK = moments(1, 96, tokens=200, seed=1)[0]
    expected = quantise(matrix_OK[None], CoreType.W4, [moment_KK])
    monkeypatch.setattr("tuckerize.linalg.quantise.SCALE_VALUES", 5 * 3**2)
    found = quantise(matrix_OK[None], CoreType.W4, [moment_KK])
    assert torch.equal(found.codes, expected.codes)
    torch.testing.assert_close(found.scales, expected.scales)

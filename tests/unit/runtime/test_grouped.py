from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tuckerize.runtime import grouped
from tuckerize.runtime.grouped import (
    Assignments,
    assign,
    gemm,
    mix_and_multiply,
    multiply,
    multiply_gathered,
    multiply_one_by_one,
    multiply_uneven,
    zero_padded,
)

EXPERTS = 5
# 16 bytes are whole numbers of (24, 16) in every type, of (7, 5) in none.
SIZES = [(24, 16), (7, 5)]
ROUNDING = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
ROUTES = {
    "random": torch.randint(0, EXPERTS, (40, 3), generator=torch.Generator().manual_seed(0)),
    "others' experts": torch.tensor([[1, -1], [9, 4], [-1, 1], [7, -5]]),
    "only others' experts": torch.tensor([[-1], [5]]),
    "one expert": torch.full((6, 1), 3),
    "no token": torch.zeros(0, 2, dtype=torch.int64),
}


def normal(*sizes: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)


def naive(rows: Tensor, matrices: list[Tensor], assigned: Assignments) -> Tensor:
    """Row by row in float64."""
    products = [
        row.double() @ matrices[expert].double()
        for row, expert in zip(rows, assigned.experts_N.tolist(), strict=True)
    ]
    return torch.stack(products) if products else torch.zeros(0, matrices[0].shape[1]).double()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("way", [multiply, multiply_gathered], ids=lambda way: way.__name__)
def test_every_row_meets_the_matrix_of_its_expert(
    way: Callable[[Tensor, Tensor, Assignments], Tensor],
    dtype: torch.dtype,
    sizes: tuple[int, int],
    route: str,
    transposed: bool,
) -> None:
    assigned = assign(ROUTES[route], range(EXPERTS))
    matrices = normal(EXPERTS, *sizes, dtype=dtype)
    if transposed:
        matrices = matrices.mT
    rows = normal(len(assigned.places_N), matrices.shape[1], dtype=dtype, seed=2)
    result = way(rows, matrices, assigned)
    assert result.dtype == dtype
    expected = naive(rows, list(matrices), assigned)
    close = ROUNDING[dtype]
    torch.testing.assert_close(result.double(), expected, rtol=close, atol=close)


@pytest.fixture(params=["kernels for 16 bits", "none"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Processors with and without kernels for 16 bits, whichever this one is."""
    slow = {torch.bfloat16, torch.float16} if request.param == "none" else set()
    monkeypatch.setattr(grouped, "_SLOW_ON_CPU", slow)
    return str(request.param)


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_product_in_16_bits_is_rounded_once(
    dtype: torch.dtype, rows: int, transposed: bool
) -> None:
    matrix = normal(300, 40, dtype=dtype)
    matrix = matrix.mT.contiguous().mT if transposed else matrix
    own = normal(rows, 300, dtype=dtype, seed=2)
    result = gemm(own, matrix)
    assert result.dtype == dtype
    expected = own.double() @ matrix.double()
    torch.testing.assert_close(
        result.double(), expected, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps
    )


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("tokens", [1, 40])
def test_layer_in_16_bits_is_that_in_float64(tokens: int) -> None:
    assigned = assign(ROUTES["random"][:tokens], range(EXPERTS))
    matrices, U_E = normal(3, 24, 16, dtype=torch.bfloat16), normal(EXPERTS, 3, seed=3)
    rows = normal(len(assigned.places_N), 24, dtype=torch.bfloat16, seed=2)
    result = mix_and_multiply(rows, U_E.bfloat16(), matrices, assigned)
    mixed = torch.tensordot(U_E.bfloat16().double(), matrices.double(), dims=1)
    expected = naive(rows, list(mixed), assigned)
    assert float((result.double() - expected).norm() / expected.norm()) < 0.01


def test_slice_with_rows_that_are_not_aligned_is_multiplied() -> None:
    assigned = assign(ROUTES["random"], range(EXPERTS))
    matrices = normal(EXPERTS, 24, 19, dtype=torch.float32)[:, :, :16]
    rows = normal(len(assigned.places_N), 24, dtype=torch.float32, seed=2)
    result = multiply(rows, matrices, assigned).double()
    torch.testing.assert_close(result, naive(rows, list(matrices), assigned), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("route", ["random", "others' experts", "one expert"])
def test_gradients_are_those_of_the_naive_product(route: str, dtype: torch.dtype) -> None:
    assigned = assign(ROUTES[route], range(EXPERTS))
    matrices = normal(EXPERTS, 24, 16, dtype=dtype).requires_grad_()
    rows = normal(len(assigned.places_N), 24, dtype=dtype, seed=2).requires_grad_()
    result = multiply(rows, matrices, assigned).square().sum()
    expected = naive(rows, list(matrices), assigned).square().sum()
    torch.testing.assert_close(
        torch.autograd.grad(result, (rows, matrices)),
        torch.autograd.grad(expected, (rows, matrices)),
        rtol=1e-4,
        atol=1e-4,
    )


def test_autocast_multiplies_in_16_bits() -> None:
    assigned = assign(ROUTES["random"], range(EXPERTS))
    matrices = [normal(24, 16, seed=seed).float().requires_grad_() for seed in range(EXPERTS)]
    rows = normal(len(assigned.places_N), 24, dtype=torch.float32, seed=2).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        result = multiply_one_by_one(rows, matrices, assigned)
    assert result.dtype == torch.bfloat16
    exact = naive(rows, matrices, assigned)
    found, expected = (
        torch.autograd.grad(own.square().sum(), (rows, *matrices)) for own in (result, exact)
    )
    pairs = zip((result.detach(), *found), (exact.detach(), *expected), strict=True)
    for own, other in pairs:
        assert float((own - other).norm() / other.norm()) < 0.02
    assert {own.dtype for own in found} == {torch.float32}


def multiply_zero_padded(rows: Tensor, matrices: list[Tensor], assigned: Assignments) -> Tensor:
    """What `multiply_uneven` does on an accelerator."""
    return multiply(rows, zero_padded(matrices), assigned)


@pytest.mark.parametrize(
    "way",
    [multiply_uneven, multiply_one_by_one, multiply_zero_padded],
    ids=lambda way: way.__name__,
)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("wide_result", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_matrices_of_different_widths_are_padded(
    way: Callable[[Tensor, list[Tensor], Assignments], Tensor],
    route: str,
    wide_result: bool,
    dtype: torch.dtype,
) -> None:
    """Values and gradients; the widest is a whole number of blocks for the grouped product."""
    assigned = assign(ROUTES[route], range(EXPERTS))
    widths = [4, 16, 8, 16, 1]
    cores = [normal(width, 8, dtype=dtype, seed=width).requires_grad_() for width in widths]
    matrices = [core.mT if wide_result else core for core in cores]
    padding = [(0, 16 - width) if wide_result else (0, 0, 0, 16 - width) for width in widths]
    whole = [
        torch.nn.functional.pad(matrix, pad) for matrix, pad in zip(matrices, padding, strict=True)
    ]
    rows = normal(len(assigned.places_N), len(whole[0]), dtype=dtype, seed=2).requires_grad_()
    result, expected = way(rows, matrices, assigned), naive(rows, whole, assigned)
    close = ROUNDING[dtype]
    torch.testing.assert_close(result.double(), expected, rtol=close, atol=close)
    if len(rows):
        found, exact = (
            torch.autograd.grad(
                output.square().sum(), (rows, *cores), allow_unused=True, materialize_grads=True
            )
            for output in (result, expected)
        )
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mixed_matrices_are_mixed_before_or_after_the_product(
    route: str, dtype: torch.dtype
) -> None:
    assigned = assign(ROUTES[route], range(EXPERTS))
    U_E, shared = normal(EXPERTS, 3, dtype=dtype), normal(3, 24, 16, dtype=dtype)
    rows = normal(len(assigned.places_N), 24, dtype=dtype, seed=2)
    mixed = torch.einsum("ep,pxy->exy", U_E.double(), shared.double())
    torch.testing.assert_close(
        mix_and_multiply(rows, U_E, shared, assigned).double(),
        naive(rows, list(mixed), assigned),
        rtol=1e-4,
        atol=1e-4,
    )


def test_assign_of_a_group_sorts_its_rows_by_expert() -> None:
    rows = assign(torch.tensor([[3, 0], [2, 3], [1, 2]]), range(2, 4))
    assert rows.counts == [2, 2]
    assert rows.experts_N.tolist() == [0, 0, 1, 1]
    assert rows.tokens_N.tolist() == [1, 2, 0, 1]
    assert rows.places_N.tolist() == [2, 5, 0, 3]


@pytest.mark.parametrize("route", ROUTES)
def test_sum_over_experts_weighs_every_row_once(route: str) -> None:
    routes = ROUTES[route]
    assigned = assign(routes, range(EXPERTS))
    rows = normal(len(assigned.places_N), 4)
    weights = normal(*routes.shape, seed=3)
    expected = torch.zeros(len(routes), 4, dtype=torch.float64)
    for row, place in zip(rows, assigned.places_N.tolist(), strict=True):
        expected[place // routes.shape[1]] += row * weights.flatten()[place]
    torch.testing.assert_close(assigned.sum_over_experts(rows, weights), expected)


def test_shapes_do_not_depend_on_data() -> None:
    with torch.device("meta"):  # tensors without data: whoever asks for it fails
        assigned = assign(torch.empty(40, 3, dtype=torch.int64), range(EXPERTS))
        rows = assigned.own_rows(torch.empty(120, 24))
        result = assigned.sum_over_experts(rows, torch.empty(40, 3))
    assert (assigned.tokens_N.shape, rows.shape) == ((120,), (120, 24))
    assert result.shape == (40, 24)

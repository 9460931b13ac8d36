"""Oblique projections between two matrices, against the singular values of their product."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tuckerize.linalg.oblique import oblique_projection


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


@settings(deadline=None, max_examples=40)
@given(
    space=st.integers(1, 12),
    readers=st.integers(1, 30),
    inputs=st.integers(1, 30),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_error_is_that_of_the_best_approximation_of_the_product(
    space: int, readers: int, inputs: int, seed: int, data: st.DataObject
) -> None:
    size = data.draw(st.integers(1, space))
    read_RN, write_NZ = matrix(readers, space, seed), matrix(space, inputs, seed + 1)
    expand_NS, reduce_SN, error = oblique_projection(
        read_RN.T @ read_RN, write_NZ @ write_NZ.T, size
    )
    product_RZ = read_RN @ write_NZ
    left_RZ = product_RZ - read_RN @ expand_NS @ reduce_SN @ write_NZ
    best = torch.linalg.svdvals(product_RZ)[size:].norm() / product_RZ.norm()
    assert abs(float(left_RZ.norm() / product_RZ.norm()) - float(best)) < 1e-6
    assert abs(error - float(best)) < 1e-6
    torch.testing.assert_close(reduce_SN @ reduce_SN.T, torch.eye(size, dtype=torch.float64))

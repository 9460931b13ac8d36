"""Quantised cores in training: the stored values forward, straight-through gradients backward."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tuckerize.domain import CoreType, Projection
from tuckerize.format.cores import CODES, core_tensors, quantised_matrices
from tuckerize.linalg.quantise import quantise
from tuckerize.names import CorePart, TensorName
from tuckerize.runtime.quantised import QuantisedCore
from tuckerize.runtime.trained import TrainedCore, encode


def parts_of(core_type: CoreType, inputs: int, seed: int) -> dict[CorePart, Tensor]:
    """A random core of 3 matrices with 5 outputs, as it is stored."""
    matrices = torch.randn(3, 5, inputs, generator=torch.Generator().manual_seed(seed))
    tensors = core_tensors(TensorName.core(Projection.UP), quantise(matrices, core_type))
    return {name.part: tensor for name, tensor in tensors if name.part is not None}


CASES = (st.sampled_from(CoreType), st.integers(1, 80), st.integers(0, 99))


@settings(max_examples=25)
@given(*CASES)
def test_begins_with_what_is_stored_and_is_stored_as_it_began(
    core_type: CoreType, inputs: int, seed: int
) -> None:
    parts = parts_of(core_type, inputs, seed)
    plain, trained = QuantisedCore(parts), TrainedCore(parts)
    assert torch.equal(plain.matrices(torch.float32), trained.matrices(torch.float32))
    assert torch.equal(plain.matrices(torch.float32, 1), trained.matrices(torch.float32, 1))
    codes = encode(trained.get_parameter(CODES[core_type]), core_type)
    assert codes.dtype == parts[CODES[core_type]].dtype
    assert (codes == parts[CODES[core_type]]).all()


@settings(max_examples=25)
@given(*CASES, st.floats(0.01, 3.0))
def test_forward_is_that_of_what_will_be_stored_and_gradients_pass(
    core_type: CoreType, inputs: int, seed: int, size: float
) -> None:
    parts = parts_of(core_type, inputs, seed)
    trained = TrainedCore(parts)
    generator = torch.Generator().manual_seed(seed)
    codes, scales = trained.get_parameter(CODES[core_type]), trained.get_parameter(CorePart.SCALES)
    with torch.no_grad():
        codes.add_(size * torch.randn(codes.shape, generator=generator))
        scales.mul_(1 + 0.1 * torch.rand(scales.shape, generator=generator))
    stored = {
        CODES[core_type]: encode(codes, core_type),
        CorePart.SCALES: scales.detach().to(trained.stored_dtype),
    }
    codes.requires_grad_()
    scales.requires_grad_()
    found = trained.matrices(torch.float32)
    torch.testing.assert_close(found, QuantisedCore(stored).matrices(torch.float32))
    weights = torch.randn(found.shape, generator=generator)
    (found * weights).sum().backward()  # type: ignore[no-untyped-call]
    known = quantised_matrices(stored)
    room = codes.shape[-1]
    per_code = scales.repeat_interleave(core_type.group_size or room, -1)[..., :room]
    rounded = per_code.detach().to(trained.stored_dtype).float()
    torch.testing.assert_close(codes.grad, weights.mT * rounded)
    of_scales = torch.zeros_like(scales)
    groups = torch.arange(room) // (core_type.group_size or room)
    of_scales.index_add_(-1, groups, weights.mT * known.codes.float())
    torch.testing.assert_close(scales.grad, of_scales, rtol=1e-4, atol=1e-3)

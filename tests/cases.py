"""One table of stacks for all tests of the tensor mathematics, and the oracles they share.

Every stack is made by a generator with a seed, in float64, and then rounded to its dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import torch
from tensorly import backend_context
from tensorly.decomposition import partial_tucker
from torch import Tensor

from tuckerize.domain import MultilinearRank, StackShape
from tuckerize.linalg.tucker import TuckerFactors


class Kind(StrEnum):
    """What the spectra of a stack look like."""

    PLANTED = "planted"  # the multilinear rank of the case, plus noise of 0.3
    TAIL = "tail"  # the multilinear rank of the case, plus noise of 1e-6
    FLAT = "flat"  # normal numbers: nothing to find
    DECAYING = "decaying"  # every mode's singular values fall from 1 to 1e-6
    DEFICIENT = "deficient"  # multilinear rank (1, 1, 1), below that of the case
    ZERO = "zero"
    TINY = "tiny"  # planted, of magnitude 1e-20
    HUGE = "huge"  # planted, of magnitude 1e20


@dataclass(frozen=True, slots=True)
class Case:
    """A stack and the multilinear rank to which it is truncated."""

    kind: Kind
    shape: StackShape
    rank: MultilinearRank
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __str__(self) -> str:
        sizes = "x".join(str(size) for size in self.shape)
        return f"{self.kind}-{sizes}-to-{self.rank}-{str(self.dtype).removeprefix('torch.')}"

    def stack(self) -> Tensor:
        """The stack, shape (E, H, I)."""
        return make_stack(self.kind, self.shape, self.rank, dtype=self.dtype, seed=self.seed)

    @property
    def precision(self) -> float:
        """What rounding in the work dtype may change of a relative residual (unitless)."""
        return 1e-9 if self.dtype == torch.float64 else 5e-6


def case(
    kind: Kind, shape: tuple[int, int, int], rank: tuple[int, int, int], dtype: torch.dtype
) -> Case:
    """A row of the table."""
    return Case(kind, StackShape(*shape), MultilinearRank(*rank), dtype)


CASES = (
    case(Kind.PLANTED, (6, 10, 14), (3, 5, 7), torch.float32),
    case(Kind.PLANTED, (6, 10, 14), (3, 5, 7), torch.float64),
    case(Kind.PLANTED, (6, 10, 14), (3, 5, 7), torch.bfloat16),
    case(Kind.PLANTED, (6, 10, 14), (3, 5, 7), torch.float16),
    case(Kind.PLANTED, (6, 10, 14), (6, 5, 7), torch.float32),  # expert mode full
    case(Kind.PLANTED, (6, 10, 14), (3, 10, 7), torch.float32),  # intermediate mode full
    case(Kind.PLANTED, (6, 10, 14), (3, 5, 14), torch.float32),  # hidden mode full
    case(Kind.PLANTED, (6, 10, 14), (3, 10, 14), torch.float32),  # one mode truncated
    case(Kind.PLANTED, (6, 10, 14), (6, 5, 14), torch.float32),
    case(Kind.PLANTED, (6, 10, 14), (6, 10, 7), torch.float32),
    case(Kind.PLANTED, (6, 10, 14), (6, 10, 14), torch.float32),  # nothing truncated
    case(Kind.PLANTED, (1, 12, 9), (1, 4, 4), torch.float32),  # one expert
    case(Kind.FLAT, (1, 12, 9), (1, 12, 4), torch.bfloat16),
    case(Kind.PLANTED, (24, 6, 10), (9, 3, 5), torch.float32),  # more experts than rows
    case(Kind.FLAT, (24, 2, 3), (6, 2, 3), torch.float32),  # and than numbers in each of them
    case(Kind.FLAT, (8, 12, 10), (4, 6, 5), torch.float32),
    case(Kind.FLAT, (8, 12, 10), (1, 1, 1), torch.float64),
    case(Kind.FLAT, (8, 12, 10), (2, 6, 3), torch.bfloat16),
    case(Kind.FLAT, (3, 530, 20), (2, 30, 15), torch.float32),  # Gram matrix in row blocks
    case(Kind.DECAYING, (8, 12, 16), (4, 6, 8), torch.float32),
    case(Kind.DECAYING, (8, 12, 16), (6, 10, 13), torch.float64),
    case(Kind.TAIL, (6, 10, 14), (3, 5, 7), torch.float32),
    case(Kind.TAIL, (6, 10, 14), (3, 5, 7), torch.float64),
    case(Kind.DEFICIENT, (6, 10, 14), (3, 5, 7), torch.float32),
    case(Kind.DEFICIENT, (6, 10, 14), (3, 5, 7), torch.float64),
    case(Kind.ZERO, (4, 5, 6), (2, 3, 4), torch.float32),
    case(Kind.ZERO, (4, 5, 6), (2, 3, 4), torch.float16),
    case(Kind.TINY, (6, 10, 14), (3, 5, 7), torch.float32),
    case(Kind.TINY, (6, 10, 14), (3, 5, 7), torch.float64),
    case(Kind.TINY, (6, 10, 14), (3, 5, 7), torch.bfloat16),
    case(Kind.HUGE, (6, 10, 14), (3, 5, 7), torch.float32),
    case(Kind.HUGE, (6, 10, 14), (3, 5, 7), torch.float64),
    case(Kind.HUGE, (6, 10, 14), (3, 5, 7), torch.bfloat16),
)
NONZERO_CASES = tuple(case for case in CASES if case.kind != Kind.ZERO)


def make_stack(
    kind: Kind,
    shape: StackShape,
    rank: MultilinearRank,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Tensor:
    """A stack of a kind; the same one for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    match kind:
        case Kind.PLANTED:
            stack = _planted(shape, rank, 0.3, generator)
        case Kind.TAIL:
            stack = _planted(shape, rank, 1e-6, generator)
        case Kind.FLAT:
            stack = _normal(shape, generator)
        case Kind.DECAYING:
            stack = _decaying(shape, generator)
        case Kind.DEFICIENT:
            stack = _planted(shape, MultilinearRank(1, 1, 1), 0.0, generator)
        case Kind.ZERO:
            stack = torch.zeros(shape, dtype=torch.float64)
        case Kind.TINY:
            stack = 1e-20 * _planted(shape, rank, 0.3, generator)
        case Kind.HUGE:
            stack = 1e20 * _planted(shape, rank, 0.3, generator)
    return stack.to(dtype)


def naive_expansion(tucker: TuckerFactors) -> npt.NDArray[np.float64]:
    """Core times factors by one einsum in float64, identities written out."""
    core = tucker.core.double().numpy()
    factors = [
        np.eye(size) if factor is None else factor.double().numpy()
        for size, factor in zip(core.shape, tucker.factors, strict=True)
    ]
    expansion: npt.NDArray[np.float64] = np.einsum(
        "pqr,ep,hq,ir->ehi", core, *factors, optimize=True
    )
    return expansion


def naive_residual(stack: Tensor, tucker: TuckerFactors) -> float:
    """Relative residual from the explicit difference in float64; 0 for a zero stack found."""
    exact = stack.double().numpy()
    unit = np.abs(exact).max() or 1.0
    missed = np.linalg.norm((exact - naive_expansion(tucker)) / unit)
    return float(missed / (np.linalg.norm(exact / unit) or 1.0))


def tensorly_residual(stack: Tensor, rank: MultilinearRank, sweeps: int) -> float:
    """What TensorLy reaches in float64 from HOSVD with this many sweeps."""
    modes = rank.truncated_modes(StackShape(*stack.shape))
    if not modes:
        return 0.0
    exact = stack.double() / (stack.double().abs().max() or 1.0)
    sizes = [rank[mode] for mode in modes]
    with backend_context("pytorch"):
        (core, factors), _ = partial_tucker(
            exact, rank=sizes, modes=list(modes), n_iter_max=sweeps, tol=0
        )
    named = {mode.factor_name: factor for mode, factor in zip(modes, factors, strict=True)}
    return naive_residual(exact, TuckerFactors(core, **named))


def singular_values(stack: Tensor, mode: int) -> npt.NDArray[np.float64]:
    """Singular values of the mode's unfolding, descending, one for every index of the mode."""
    unfolding = np.moveaxis(stack.double().numpy(), mode, 0).reshape(stack.shape[mode], -1)
    values = np.linalg.svd(unfolding, compute_uv=False)
    return np.pad(values, (0, stack.shape[mode] - len(values)))


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    basis: Tensor = torch.linalg.qr(_normal((rows, columns), generator))[0]
    return basis


def _planted(
    shape: StackShape, rank: MultilinearRank, noise: float, generator: torch.Generator
) -> Tensor:
    core = _normal(rank, generator)
    factors = [
        _orthonormal(size, planted, generator) for size, planted in zip(shape, rank, strict=True)
    ]
    signal: Tensor = torch.einsum("pqr,ep,hq,ir->ehi", core, *factors)
    rest = _normal(shape, generator)
    stack: Tensor = signal / signal.norm() + noise * rest / rest.norm()
    return stack


def _decaying(shape: StackShape, generator: torch.Generator) -> Tensor:
    stack = _normal(shape, generator)
    for mode, size in enumerate(shape):
        decay = torch.logspace(0, -6, size, dtype=torch.float64)
        mixed = _orthonormal(size, size, generator) * decay
        stack = torch.tensordot(mixed, stack.movedim(mode, 0), dims=1).movedim(0, mode)
    return stack

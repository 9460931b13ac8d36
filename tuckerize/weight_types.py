"""Types of stored weights, and the bytes that Tucker tensors take in them.

Pure Python: planners count whole searches of candidates with the same formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from tuckerize.domain import CoreType

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Count = TypeVar("Count", int, "npt.NDArray[np.float64]")
"""A size, or the sizes of many candidates at once."""


@dataclass(frozen=True, slots=True)
class WeightType:
    """Encoding of stored cores and factors.

    Attributes:
        name: safetensors' name of the type.
        bits: Bits per value.
        rounding: Half a unit in the last place: about the relative error of rounding a core and
            its factors (unitless).
        cores: Encoding of cores, the type being that of factors and scales; None for the same.
    """

    name: str
    bits: int
    rounding: float
    cores: CoreType | None = None

    @property
    def plain(self) -> WeightType:
        """The type with cores in it, too."""
        return replace(self, cores=None)

    def core_bytes(
        self,
        rank: tuple[Count, Count, Count],
        *,
        transposed: bool,
        width_step: int | None = None,
    ) -> Count:
        """Bytes of a core with its scales and its padding.

        Args:
            rank: Core sizes (r_E, r_H, r_I).
            transposed: Whether its inputs are neurons, as those of down_proj.
            width_step: Divisor of the widths of the experts where these differ and r_H is their
                mean. The bytes are an upper bound then, of groups and words that are not full.
        """
        experts, outputs, inputs = rank
        if self.cores is None:
            return experts * outputs * inputs * self.bits // 8
        step = None
        if transposed:
            outputs, inputs = inputs, outputs
            step = width_step
        word, group = self.cores.word_codes, self.cores.group_size
        values = experts * outputs * padded(inputs, word, step)
        scales = experts * outputs
        if group:
            scales = -(-scales * padded(inputs, group, step) // group)
        return values * self.cores.bits // 8 + scales * self.bits // 8


def padded(size: Count, unit: int, step: int | None = None) -> Count:
    """Round a size up to a multiple of a unit.

    Args:
        size: The size, or the mean of several.
        unit: The unit.
        step: Divisor of the sizes where `size` is a mean; the result is the largest possible mean.
    """
    return -(-size // unit) * unit if step is None else size + unit - math.gcd(step, unit)


WEIGHT_TYPES = {
    kind.name: kind
    for kind in (
        WeightType("BF16", 16, 2.0**-8),
        WeightType("F16", 16, 2.0**-11),
        WeightType("F32", 32, 2.0**-24),
        WeightType("F64", 64, 2.0**-53),
    )
}
"""Types that cores and factors are stored in, by safetensors' name."""


def stored_parameters(
    shape: tuple[Count, Count, Count], rank: tuple[Count, Count, Count], *, coupled: int = 1
) -> Count:
    """Parameters of coupled Tucker tensors: cores and the factors of truncated modes.

    Args:
        shape: Sizes (E, H, I) of every stack.
        rank: Core sizes (r_E, r_H, r_I) of every stack.
        coupled: Number of stacks that share one U_I.
    """
    core = rank[0] * rank[1] * rank[2]
    return coupled * core + _factor_parameters(shape, rank, coupled)


def _factor_parameters(
    shape: tuple[Count, Count, Count], rank: tuple[Count, Count, Count], coupled: int
) -> Count:
    U_E, U_H, U_I = (n * r * (r < n) for n, r in zip(shape, rank, strict=True))
    return coupled * (U_E + U_H) + U_I


def stored_bytes(
    shape: tuple[Count, Count, Count],
    rank: tuple[Count, Count, Count],
    weights: WeightType,
    *,
    coupled: int = 1,
    transposed: bool = False,
    width_step: int | None = None,
) -> Count:
    """Bytes of coupled Tucker tensors on disk: the unit of every budget and estimate.

    Args:
        shape: Sizes (E, H, I) of every stack.
        rank: Core sizes (r_E, r_H, r_I) of every stack.
        weights: Type that they are stored in.
        coupled: Number of stacks that share one U_I.
        transposed: Whether they are of down_proj.
        width_step: Divisor of the widths of the experts where these differ, see
            `WeightType.core_bytes`.
    """
    factors = _factor_parameters(shape, rank, coupled) * weights.bits // 8
    cores = weights.core_bytes(rank, transposed=transposed, width_step=width_step)
    return coupled * cores + factors

"""Refuse numbers that cannot be stored."""

from __future__ import annotations

import math

from torch import Tensor

from tuckerize.errors import NonFiniteError
from tuckerize.linalg.tucker import largest_magnitude


def finite(tensor: Tensor, dtype: str) -> Tensor:
    """The tensor, already rounded to a type, if no number of it overflowed.

    Raises:
        NonFiniteError: One did.
    """
    if not math.isfinite(largest_magnitude(tensor)):
        raise NonFiniteError(
            f"a core or factor overflows {dtype}", hint="store it as --dtype bfloat16 or float32"
        )
    return tensor

"""Documented constraints of Ascend's operators, as named checks that a message can quote."""

from __future__ import annotations

from typing import NamedTuple

import torch

HALF_TYPES = (torch.float16, torch.bfloat16)
"""16-bit types of the operators."""


class Constraint(NamedTuple):
    """One documented constraint, checked.

    Attributes:
        name: The constrained quantity.
        found: Its value.
        allowed: Its allowed values.
        met: Whether the value is allowed.
    """

    name: str
    found: str
    allowed: str
    met: bool

    def __str__(self) -> str:
        """The constraint on one line of a message."""
        return f"{self.name} is {self.found}, allowed {self.allowed}"


def at_most(name: str, found: int, most: int) -> Constraint:
    """Constraint of a count: 1 to `most`."""
    return Constraint(name, str(found), f"1 to {most}", 1 <= found <= most)

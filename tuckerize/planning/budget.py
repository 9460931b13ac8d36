"""The bytes of the routed experts that a decomposition may keep."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tuckerize.errors import UsageError


@dataclass(frozen=True, slots=True)
class Budget:
    """A share of the dense bytes, as a user asks for it.

    Attributes:
        share: Of the dense bytes, in the type of the factors, in (0, 1].
        bits: Bits per routed weight of the dense model that it stands for; None where the user gave
            the share.
    """

    share: float
    bits: float | None = None

    @classmethod
    def of_bits(cls, bits: float, *, dense_bits: int) -> Budget:
        """So many bits per routed weight, of a model with so many; at most what the model has."""
        return cls(min(1.0, bits / dense_bits), bits)

    def bytes(self, dense: int) -> int:
        """Bytes that may be stored of dense experts of so many bytes."""
        return math.floor(self.share * dense)

    def check(self, *, dense: int, least: float, advice: str = "") -> None:
        """Refuse a budget that does not pay for the smallest sizes.

        Args:
            dense: Bytes of the dense experts, in the type of the factors.
            least: Bytes of the smallest sizes.
            advice: Remedies besides a larger budget, for the hint.

        Raises:
            UsageError: It is too small; the hint names the smallest that is not.
        """
        if least <= self.bytes(dense):
            return
        name, value, unit = "keep", self.share, 1.0
        if self.bits is not None:
            name, value, unit = "bits", self.bits, self.bits / self.share
        raise UsageError(
            f"{name} {value:g} is below what the smallest sizes store",
            hint=f"choose {name} of at least {math.ceil(1000 * unit * least / dense) / 1000:g}"
            f"{advice}",
        )

"""The share of the routed experts' bytes that a decomposition may keep."""

from __future__ import annotations

import math

from tuckerize.errors import UsageError


def check_budget(keep: float, *, dense: float, least: float, advice: str = "") -> None:
    """Refuse a budget that does not pay for the smallest sizes.

    Args:
        keep: Kept share of the dense bytes, in (0, 1].
        dense: Bytes of the dense experts, in the type that the result is stored in.
        least: Bytes of the smallest sizes.
        advice: Remedies besides a larger budget, for the hint.

    Raises:
        UsageError: `keep` is too small; the hint names the smallest that is not.
    """
    if least > math.floor(keep * dense):
        raise UsageError(
            f"keep {keep:g} is below what the smallest sizes store",
            hint=f"choose keep of at least {math.ceil(1000 * least / dense) / 1000:g}{advice}",
        )

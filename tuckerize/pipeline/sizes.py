"""Numbers and bytes of a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tuckerize.domain import Size, TensorHeader


def measure(tensors: Mapping[str, TensorHeader], *, is_routed: Callable[[str], bool]) -> Size:
    """Count the numbers and bytes of the routed experts and of all tensors."""
    routed = [header for name, header in tensors.items() if is_routed(name)]
    return Size(
        routed_parameters=sum(header.parameters for header in routed),
        routed_bytes=sum(header.bytes for header in routed),
        total_parameters=sum(header.parameters for header in tensors.values()),
        total_bytes=sum(header.bytes for header in tensors.values()),
    )

"""Position of this process on the device mesh, and its dispatch method."""

from __future__ import annotations

from datetime import timedelta
from typing import NamedTuple

import torch

from tuckerize.ascend.dispatch import FusedPair
from tuckerize.format.shards import Sharding
from tuckerize.parallel.mesh import Position, make_mesh, new_group_along, own_tokens, padded_count
from tuckerize.runtime.sharded import fused_use_of


class Placement(NamedTuple):
    """Position of a process, and its dispatch.

    Attributes:
        position: This process on the mesh of the shards.
        fused: Ascend's fused dispatch and combine, where they are used.
        unmet: On an NPU, why they are not: the first of their constraints that is not met.
    """

    position: Position
    fused: FusedPair | None = None
    unmet: str | None = None

    @property
    def dispatch(self) -> str | None:
        """Kind of dispatch; None where experts are not split."""
        if self.position.ep.size == 1:
            return None
        return "plain" if self.fused is None else "fused"


def make_placement(
    device: torch.device,
    sharding: Sharding,
    *,
    tokens: int,
    dtype: torch.dtype,
    sequence_parallel: bool,
    timeout: timedelta,
) -> Placement:
    """Make the communicators of the run, which all processes do together.

    Args:
        device: This process's device.
        sharding: The shards.
        tokens: Tokens of all processes.
        dtype: Their type.
        sequence_parallel: Whether each of the tensor-parallel processes has its own tokens.
        timeout: How long processes wait for each other.
    """
    sizes = sharding.mesh
    mesh = make_mesh(device.type, tp=sizes.tp, ep=sizes.ep, cp=sizes.cp, timeout=timeout)
    position = Position.on(mesh, sequence_parallel=sequence_parallel)
    if device.type != "npu" or sizes.ep == 1:
        return Placement(position)
    use = fused_use_of(
        sharding,
        position,
        device,
        tokens=len(own_tokens(padded_count(tokens, position.parallelism), position)),
        dtype=dtype,
    )
    if use.unmet:
        return Placement(position, unmet=str(use.unmet[0]))
    pair = FusedPair.create(use, new_group_along(mesh, "ep", timeout=timeout))
    return Placement(position, pair)

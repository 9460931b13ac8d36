"""What config.json announces of a Tucker checkpoint (`quantization_config`), in docs/format.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tuckerize.domain import GATE_UP, MultilinearRank, Projection, StackShape
from tuckerize.names import TensorName

METHOD = "tuckerize"
"""`quant_method`: the name by which transformers and vLLM find what loads the checkpoint."""

FORMAT_VERSION = 2
"""`format_version` of what is announced."""


def check_format(announced: Mapping[str, Any]) -> None:
    """Refuse what another release has announced.

    Raises:
        ValueError: The format has another version.
    """
    version = announced.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"the checkpoint has format_version {version!r}, this tuckerize reads "
            f"{FORMAT_VERSION}: use the release that wrote it"
        )


def announce_group(
    ranks: Mapping[Projection, MultilinearRank], widths: Sequence[int]
) -> dict[str, Any]:
    """What is announced of one group: the widths of its experts and the core sizes.

    Args:
        ranks: Core sizes of every projection.
        widths: Neurons of every expert.
    """
    equal = len(set(widths)) == 1
    sizes = {str(projection): list(rank) for projection, rank in ranks.items()}
    return {"neurons": widths[0] if equal else list(widths), **sizes}


def widths_of(group: Mapping[str, Any], experts: int) -> list[int]:
    """Neurons of every expert of a group, from what `announce_group` gave."""
    neurons = group["neurons"]
    return [neurons] * experts if isinstance(neurons, int) else list(neurons)


def group_shapes(
    group: Mapping[str, Any], *, experts: int, hidden: int, joint: str | None
) -> dict[TensorName, tuple[int, ...]]:
    """Shapes of the tensors of one group, by their names relative to it.

    Args:
        group: What `announce_group` gave.
        experts: Experts in the group.
        hidden: Hidden size I.
        joint: Projections that share one U_I.
    """
    widths = widths_of(group, experts)
    stack = StackShape(experts, sum(widths) // experts, hidden)
    shapes: dict[TensorName, tuple[int, ...]] = {}
    for projection in Projection:
        rank = MultilinearRank(*group[projection])
        if len(set(widths)) == 1:
            shapes[TensorName.core(projection)] = tuple(rank)
        else:
            for expert, width in enumerate(widths):
                shapes[TensorName.core(projection, expert)] = (width, rank.hidden)
        coupling = GATE_UP if joint and projection in GATE_UP else None
        for mode in rank.truncated_modes(stack):
            shapes[TensorName.factor(mode, projection, coupling)] = (stack[mode], rank[mode])
    return shapes

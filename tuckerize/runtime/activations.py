"""Activations: what an expert computes between gate and up, and down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from tuckerize.errors import CheckpointError
from tuckerize.moe.family import Glu

Activation = Callable[[Tensor, Tensor], Tensor]
"""Function from gate and up to neurons, all of one shape."""

_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "swish": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


@dataclass(frozen=True, slots=True)
class _GatedLinearUnit:
    """The activation that a `Glu` describes."""

    glu: Glu

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Neurons from gate and up."""
        glu = self.glu
        if glu.limit is not None:
            up = up.clamp(-glu.limit, glu.limit)
            gate = gate if glu.limits_activated else gate.clamp(max=glu.limit)
        if glu.soft_caps is not None:
            gate_cap, up_cap = glu.soft_caps
            activated = gate_cap * torch.tanh(gate / gate_cap) * torch.sigmoid(gate)
            up = up_cap * torch.tanh(up / up_cap)
        elif glu.slope == 1.0:
            activated = _FUNCTIONS[glu.activation](gate)
        else:
            activated = gate * torch.sigmoid(gate * glu.slope)
        if glu.limit is not None and glu.limits_activated:
            activated = activated.clamp(max=glu.limit)
        return activated * (up + glu.offset if glu.offset else up)


def activation_of(glu: Glu) -> Activation:
    """The activation of experts.

    Args:
        glu: Their gated linear unit.

    Raises:
        CheckpointError: Its activation is not known.
    """
    if glu.activation not in _FUNCTIONS:
        raise CheckpointError(
            f"hidden_act '{glu.activation}' in config.json is not known",
            hint=f"known: {', '.join(sorted(_FUNCTIONS))}",
        )
    return _GatedLinearUnit(glu)

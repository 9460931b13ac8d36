"""Measured traffic, beside a layout's prediction for the same routes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from tuckerize.parallel.layouts import Collective, ExpertLoad, LayerShape, Parallelism, Traffic
from tuckerize.parallel.mesh import Axis, Position, own_tokens
from tuckerize.parallel.processes import Processes
from tuckerize.report.verification import CollectiveTraffic


class LayerMoved(NamedTuple):
    """Traffic of a layer's collectives, in bytes.

    Attributes:
        counted: By this process, for all of its tokens.
        predicted: Per token, on average over processes.
        dense: Per token in the dense model.
    """

    counted: Traffic
    predicted: Traffic
    dense: Traffic


def load_of(experts_Tk: Tensor, sizes: LayerShape, mesh: Parallelism) -> ExpertLoad:
    """Distribution of tokens over the experts of a mesh.

    Args:
        experts_Tk: Experts of all tokens of the mesh, shape (T, k).
        sizes: Sizes of the layer.
        mesh: The mesh.
    """
    tokens, top_k = experts_Tk.shape
    groups = torch.bincount(experts_Tk.flatten() // sizes.shape.experts, minlength=len(sizes.ranks))
    owners_Tk = experts_Tk // (sizes.experts // mesh.ep)
    copies = remote = 0
    for cp_rank in range(mesh.cp):
        for ep_rank in range(mesh.ep):
            position = Position(ep=Axis(mesh.ep, ep_rank), cp=Axis(mesh.cp, cp_rank))
            own_Tk = owners_Tk[own_tokens(tokens, position)]
            copies += sum(
                int((own_Tk == other).any(1).sum()) for other in range(mesh.ep) if other != ep_rank
            )
            remote += int((own_Tk != ep_rank).sum())
    rows = [count / tokens for count in groups.tolist()]
    return ExpertLoad(top_k, rows, copies / tokens, remote / tokens)


def compare(
    moved: Sequence[LayerMoved], processes: Processes, tokens: int
) -> tuple[CollectiveTraffic, ...]:
    """Traffic of all processes through layers, by kind of collective; unused kinds are left out.

    Args:
        moved: Traffic of every layer.
        processes: The processes of the run.
        tokens: Tokens per position of the mesh.
    """
    found = []
    for kind in Collective:
        own = sum(layer.counted[kind] for layer in moved)
        counted = fmean(processes.gather(own)) / tokens
        predicted = sum(layer.predicted.get(kind, 0.0) for layer in moved)
        dense = sum(layer.dense.get(kind, 0.0) for layer in moved)
        if counted or predicted or dense:
            found.append(CollectiveTraffic(kind, counted, predicted, dense))
    return tuple(found)

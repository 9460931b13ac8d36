"""Processes that share the experts of a layer, and the windows of its calibration set."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from tuckerize.calibration.rows import gathered
from tuckerize.calibration.states import States
from tuckerize.domain import DOWN, GATE_UP, Coupling, coupling_name
from tuckerize.errors import ParallelError
from tuckerize.linalg.sharing import ALONE, Sharing
from tuckerize.names import TensorKind, TensorName
from tuckerize.parallel.collectives import exchange_counts, exchange_rows, gather_rows
from tuckerize.parallel.layouts import owned_slice
from tuckerize.parallel.mesh import Axis
from tuckerize.parallel.processes import Processes
from tuckerize.runtime.exchange import (
    AllGatherDispatch,
    AllToAllDispatch,
    Combine,
    DispatchStep,
    Exchange,
    Tokens,
)

T = TypeVar("T")


class SharedByProcesses(Sharing):
    """Processes of a run, of which each has a part of the experts of every group.

    Sums are those of the collective, in an order that depends on the number of processes alone.

    Args:
        axis: The processes.
        group_size: Experts of a group.

    Raises:
        ParallelError: There are more processes than experts in a group.
    """

    def __init__(self, axis: Axis, group_size: int) -> None:
        if group_size < axis.size:
            raise ParallelError(
                f"{axis.size} processes cannot share the {group_size} experts of a group",
                hint=f"start {group_size} processes at most (--nproc-per-node), or use larger "
                "groups (--group-size)",
            )
        self.axis = axis
        self.size, self.rank = axis.size, axis.rank

    def own(self, count: int) -> slice:
        """Which of so many experts, or other things in a row, are this process's."""
        own = owned_slice(count, self.size, self.rank)
        return slice(own.start, own.stop)

    def total(self, count: int) -> int:
        """The sum of every process's count."""
        return int(self.sum(torch.tensor(count)))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every process's tensor, all of one shape."""
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.axis.group)
        return total

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, one process after another; counts of rows may differ."""
        counts = self._counts(len(rows), rows.device)
        most = max(counts)
        if not most:
            return rows
        # As bytes: not every backend sends every type.
        wide = rows.contiguous().view(len(rows), math.prod(rows.shape[1:])).view(torch.uint8)
        padded = functional.pad(wide, (0, 0, 0, most - len(rows)))
        parts = gather_rows(padded, self.axis).view(self.size, most, -1)
        whole = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        return whole.view(rows.dtype).view(-1, *rows.shape[1:])

    def gram(self, matrix_EM: Tensor) -> Tensor:
        """Products of the rows of all processes, shape (E, E).

        Each gets some columns of all rows for its own rows' other columns.
        """
        rows, columns = matrix_EM.shape
        width = -(-columns // self.size)
        padded = functional.pad(matrix_EM, (0, width * self.size - columns))
        outgoing = padded.view(rows, self.size, width).transpose(0, 1).flatten(0, 1)
        counts = self._counts(rows, matrix_EM.device)
        columns_EC = exchange_rows(outgoing, [rows] * self.size, counts, self.axis)
        return self.sum(columns_EC @ columns_EC.T)

    def each(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """The results of calls that one process each makes for all."""
        found = self.of_all([call() for call in calls[self.rank :: self.size]])
        return [found[index % self.size][index // self.size] for index in range(len(calls))]

    def of_all(self, value: T) -> list[T]:
        """Every process's value."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.axis.group)
        return found

    def of_first(self, call: Callable[[], T]) -> T:
        """The result of a call that the first process makes for all."""
        result: list[Any] = [call() if self.is_first else None]
        host = torch.device("cpu")
        dist.broadcast_object_list(result, src=0, group=self.axis.group, device=host)
        found: T = result[0]
        return found

    def _counts(self, count: int, device: torch.device) -> list[int]:
        """Counts of all processes."""
        return exchange_counts([count] * self.size, self.axis, device)


def sharing_of(processes: Processes | None, group_size: int) -> Sharing:
    """The sharing of groups of so many experts by the processes of a run."""
    if processes is None or processes.size == 1:
        return ALONE
    axis = Axis(processes.size, processes.rank, dist.group.WORLD)
    return SharedByProcesses(axis, group_size)


def own_windows(states: States, sharing: Sharing) -> States:
    """The windows of this process, as many as every other's: the last one may be there again."""
    if sharing.size == 1:
        return states
    return states[own_places(len(states), sharing)]


def own_places(count: int, sharing: Sharing) -> list[int]:
    """Which of so many windows are this process's; see `own_windows`."""
    each = -(-count // sharing.size)
    places = range(sharing.rank * each, (sharing.rank + 1) * each)
    return [min(place, count - 1) for place in places]


def num_own_windows(count: int, sharing: Sharing) -> int:
    """Number of windows, of so many that are shared, that no process before this one has."""
    each = -(-count // sharing.size)
    return min(each, max(0, count - sharing.rank * each))


def all_windows(states: States, sharing: Sharing, count: int, folder: Path | None = None) -> States:
    """The states of all windows, of which there are so many, from those of each process.

    Args:
        states: Those of this process's windows.
        sharing: The processes.
        count: Number of windows.
        folder: Of files that hold them; see `Rows`.
    """
    if sharing.size == 1:
        return states
    own: list[Any] = [getattr(states, field.name) for field in fields(states)]
    whole: list[Any] = [None if t is None else gathered(t, sharing, count, folder) for t in own]
    return States(*whole)


def exchange_for(
    groups: Sequence[Mapping[TensorName, Tensor]], sharing: Sharing, group_size: int
) -> Exchange:
    """Communication of a layer of which each process has its own experts and tokens.

    Args:
        groups: This process's tensors of every group, by their names relative to it.
        sharing: The processes.
        group_size: Experts of a group.
    """
    if not isinstance(sharing, SharedByProcesses):
        return Exchange()
    steps = [_ToOwners.of(len(groups), group_size, sharing.axis)]
    latent_output = _is_smaller(groups, DOWN)
    if _is_smaller(groups, GATE_UP):
        return Exchange([], steps, latent_output)
    return Exchange(steps, [], latent_output)


def _is_smaller(groups: Sequence[Mapping[TensorName, Tensor]], coupling: Coupling) -> bool:
    """Whether tokens have fewer values in the latent spaces of all groups than hidden ones."""
    shared = coupling_name(coupling)
    total, hidden = 0, math.inf
    for group in groups:
        factors = {n.owner: t for n, t in group.items() if n.kind == TensorKind.U_I}
        owners = [shared] if shared in factors else list(coupling)
        if not factors.keys() >= set(owners):
            return False
        total += sum(factors[owner].shape[1] for owner in owners)
        hidden = len(factors[owners[0]])
    return total < hidden


@dataclass(frozen=True)
class _ToOwners(DispatchStep):
    """Dispatch to the processes that own parts of every group.

    Attributes:
        labels_E: Experts of the layer in the numbering of `step`: by process, then as it counts.
        step: Sends tokens to processes with equally many experts.
    """

    labels_E: Tensor
    step: DispatchStep

    @classmethod
    def of(cls, groups: int, group_size: int, axis: Axis) -> _ToOwners:
        """For groups of so many experts."""
        slices = [owned_slice(group_size, axis.size, rank) for rank in range(axis.size)]
        stride = groups * slices[0].length  # the largest
        labels_E = torch.tensor(
            [
                rank * stride + group * own.length + place
                for group in range(groups)
                for rank, own in enumerate(slices)
                for place in range(own.length)
            ]
        )
        send = AllToAllDispatch if axis.has_all_to_all else AllGatherDispatch
        return cls(labels_E, send(axis, stride))

    def dispatch(self, tokens: Tokens) -> tuple[Tokens, Combine]:
        """Dispatch tokens by the owners of their experts."""
        labels_E = self.labels_E.to(tokens.experts_Tk.device)
        return self.step.dispatch(tokens._replace(experts_Tk=labels_E[tokens.experts_Tk.long()]))

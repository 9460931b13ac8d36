"""Device mesh with axes cp, ep and tp, and the tokens of each position.

cp and ep split tokens, ep splits experts, tp splits each expert's weights.
"""

from __future__ import annotations

import math
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tuckerize.errors import ParallelError
from tuckerize.parallel.layouts import Parallelism, owned_slice

AXES = ("cp", "ep", "tp")
"""Mesh axes from slowest to fastest varying rank."""


# https://docs.pytorch.org/docs/stable/distributed.html#backends; hccl: Ascend's API table.
_WITH_ALL_TO_ALL = {"gloo", "mpi", "nccl", "hccl", "xccl"}


class Axis(NamedTuple):
    """The processes along one axis of the mesh.

    Attributes:
        size: Number of processes.
        rank: Rank of this process along the axis.
        group: Their process group; None for a single process.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def has_all_to_all(self) -> bool:
        """Whether the backend of the group supports all-to-all."""
        if self.group is None:
            return True
        backends = str(dist.get_backend(self.group)).split(",")  # cpu:gloo,npu:hccl
        return {name.rpartition(":")[2] for name in backends} <= _WITH_ALL_TO_ALL


def make_mesh(
    device_type: str, *, tp: int, ep: int = 1, cp: int = 1, timeout: timedelta | None = None
) -> DeviceMesh:
    """Make the mesh of all processes of the run.

    Args:
        device_type: Type of the devices: `cpu`, `npu`, `cuda`.
        tp: Size of the tensor-parallel axis.
        ep: Size of the expert-parallel axis.
        cp: Size of the context-parallel axis.
        timeout: How long processes wait for each other; None for torch's default.

    Raises:
        ParallelError: There is no process group, or it does not have tp x ep x cp processes.
    """
    _check_process_group()
    check_world(dist.get_world_size(), Parallelism(tp, ep, cp))
    ranks = torch.arange(dist.get_world_size()).view(cp, ep, tp)
    # init_device_mesh would give the groups torch's default time-out.
    groups = [_group(_along(ranks, axis), timeout) for axis in range(len(AXES))]
    return DeviceMesh.from_group(groups, device_type, ranks, mesh_dim_names=AXES)


def new_group_along(
    mesh: DeviceMesh, name: str, *, timeout: timedelta | None = None
) -> dist.ProcessGroup:
    """Make a second communicator along an axis of a mesh; all processes call this.

    Args:
        mesh: The mesh of all processes of the run.
        name: Name of the axis.
        timeout: How long processes wait for each other; None for torch's default.
    """
    return _new_group(_along(mesh.mesh, (mesh.mesh_dim_names or ()).index(name)), timeout)


def check_world(processes: int, mesh: Parallelism) -> None:
    """Check that the sizes of a mesh match the number of processes.

    Raises:
        ParallelError: They do not; the hint lists sizes that do.
    """
    sizes = (mesh.tp, mesh.ep, mesh.cp)
    if min(sizes) >= 1 and math.prod(sizes) == processes:
        return
    tp, ep, cp = (max(1, size) for size in sizes)
    candidates = [
        (processes // (ep * cp), ep, cp),
        (tp, processes // (tp * cp), cp),
        (tp, ep, processes // (tp * ep)),
        (processes, 1, 1),
    ]
    fitting = (
        "--tp {} --ep {} --cp {}".format(*candidate)
        for candidate in dict.fromkeys(candidates)
        if math.prod(candidate) == processes
    )
    raise ParallelError(
        f"{processes} processes are not tp x ep x cp = {mesh.tp} x {mesh.ep} x {mesh.cp}",
        hint="sizes that fit: " + "; ".join(fitting),
    )


def axis_of(mesh: DeviceMesh, name: str) -> Axis:
    """One axis of a mesh; a single process if the mesh lacks the axis."""
    if name not in (mesh.mesh_dim_names or ()):
        return Axis()
    group = mesh.get_group(name)
    return Axis(group.size(), mesh.get_local_rank(name), group)


class Position(NamedTuple):
    """Position of a process on the mesh.

    Attributes:
        tp: Its tensor-parallel axis.
        ep: Its expert-parallel axis.
        cp: Its context-parallel axis.
        sequence_parallel: Whether each tp process has its own tokens.
    """

    tp: Axis = Axis()
    ep: Axis = Axis()
    cp: Axis = Axis()
    sequence_parallel: bool = False

    @classmethod
    def on(cls, mesh: DeviceMesh, *, sequence_parallel: bool = False) -> Position:
        """The position of this process; a mesh may lack axes of size 1."""
        _check_process_group()
        tp, ep, cp = (axis_of(mesh, name) for name in ("tp", "ep", "cp"))
        return cls(tp, ep, cp, sequence_parallel)

    @property
    def parallelism(self) -> Parallelism:
        """Sizes of the mesh, and how tokens are communicated on it."""
        return Parallelism(
            self.tp.size,
            self.ep.size,
            self.cp.size,
            sequence_parallel=self.sequence_parallel,
            all_to_all=self.ep.has_all_to_all,
        )


def padded_count(tokens: int, mesh: Parallelism) -> int:
    """Round a number of tokens up so that it divides evenly over a mesh.

    Source:
        Megatron-LM, megatron/core/models/multimodal/context_parallel.py, `get_padding`: a sequence
        is padded to a multiple of 2 cp, of tp with sequence parallelism, of 2 cp tp with both.
    """
    multiple = mesh.ep * (2 * mesh.cp if mesh.cp > 1 else 1)
    multiple *= mesh.tp if mesh.sequence_parallel else 1
    return -(-tokens // multiple) * multiple


def own_tokens(tokens: int, position: Position) -> torch.Tensor:
    """Indices of the tokens of a process, for a number of tokens as `padded_count` returns.

    A sequence is split into 2 cp chunks, of which cp rank r gets chunks r and 2 cp - 1 - r, so that
    causal attention is balanced. The processes along ep share these tokens equally.

    Source:
        Megatron-LM, megatron/core/utils.py, `get_batch_on_this_cp_rank`.
    """
    own = torch.arange(tokens)
    if position.cp.size > 1:
        chunks = own.chunk(2 * position.cp.size)
        own = torch.cat([chunks[position.cp.rank], chunks[-1 - position.cp.rank]])
    for axis in (position.ep, position.tp if position.sequence_parallel else Axis()):
        own = own.narrow(0, *owned_slice(len(own), axis.size, axis.rank))
    return own


def _group(ranks: list[list[int]], timeout: timedelta | None) -> dist.ProcessGroup:
    """This process's group among disjoint groups; the world group if it is the only one."""
    if len(ranks) == 1 and dist.group.WORLD is not None:
        return dist.group.WORLD
    return _new_group(ranks, timeout)


def _new_group(ranks: list[list[int]], timeout: timedelta | None) -> dist.ProcessGroup:
    group: dist.ProcessGroup
    group, _ = dist.new_subgroups_by_enumeration(ranks, timeout=timeout)  # type: ignore[no-untyped-call]
    return group


def _along(ranks: torch.Tensor, axis: int) -> list[list[int]]:
    rows: list[list[int]] = ranks.movedim(axis, -1).flatten(0, -2).tolist()
    return rows


def _check_process_group() -> None:
    if not dist.is_initialized():
        raise ParallelError(
            "sharded layers need a process group, and there is none yet",
            hint="start with torchrun, and call torch.distributed.init_process_group first",
        )

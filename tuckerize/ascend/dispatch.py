"""Ascend's fused dispatch and combine of expert parallelism: when they may be used, and how.

`npu_moe_distribute_dispatch_v2` sends every token to the processes that own its experts, and
`npu_moe_distribute_combine_v2` brings the results back and sums them with the routing weights. They
run on A2 and A3 only, for inference only, in pairs, and on a communicator that nothing else uses.
How many rows arrive is known to the device alone: nothing waits for the host.

Source: torch_npu 2.13 (schemas); CANN's ops-transformer, MoeDistributeDispatchV2 and CombineV2, and
op-plugin, npu_grouped_matmul (constraints), August 2026.
"""

from __future__ import annotations

import os
from collections.abc import Container
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tuckerize.ascend.npu import import_torch_npu
from tuckerize.errors import ParallelError
from tuckerize.parallel.backends import npu_product
from tuckerize.parallel.mesh import own_group

ROW_STEP = 32
"""Rows of any width can be sent where they are filled up to a multiple of this with zeros."""

_MIB = 2**20


class _Limits(NamedTuple):
    """What a product allows with one of its algorithms."""

    hidden: range
    tokens: int
    top_k: int
    ep_sizes: Container[int]
    ep_sizes_text: str


_A2_FULL_MESH = (2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 256)
_A3_HIDDEN = range(1024, 8193)
_A3_EP = (range(2, 769), "2 to 768")

_LIMITS = {
    ("A2", "fullmesh"): _Limits(
        range(32, 7169, 32), 256, 16, _A2_FULL_MESH, "2 to 8, 16, 32, 64, 128, 256"
    ),
    ("A2", "hierarchy"): _Limits(range(32, 10241, 32), 512, 16, (16, 32, 64), "16, 32, 64"),
    ("A3", "fullmesh_v1"): _Limits(_A3_HIDDEN, 512, 16, *_A3_EP),
    ("A3", "fullmesh_v2"): _Limits(_A3_HIDDEN, 256, 12, *_A3_EP),
    ("A3", "hierarchy"): _Limits(_A3_HIDDEN, 256, 16, *_A3_EP),
}
_MOST_EXPERTS = 1024

# HCCL_BUFFSIZE where it is not set, in MiB.
_BUFFER = 200

# Within a node, and what the operators take by themselves.
_USUAL_ALGORITHM = {"A2": "fullmesh", "A3": "fullmesh_v1"}


@dataclass(frozen=True, slots=True)
class FusedUse:
    """One use of the fused pair; it must be the same in all layers and on all processes.

    Attributes:
        product: A2 or A3; others do not have it.
        algorithm: `comm_alg`: fullmesh or hierarchy on A2; fullmesh_v1, fullmesh_v2 or hierarchy
            on A3.
        tokens: Most tokens of a process.
        hidden: Width of what is sent.
        top_k: Experts a token.
        experts: Routed experts of a layer.
        ep_size: Expert-parallel processes.
        dtype: Type of what is sent.
        buffer: HCCL_BUFFSIZE in MiB.
    """

    product: str
    algorithm: str
    tokens: int
    hidden: int
    top_k: int
    experts: int
    ep_size: int
    dtype: torch.dtype = torch.bfloat16
    buffer: int = _BUFFER

    @classmethod
    def on(
        cls, device: torch.device, *, tokens: int, hidden: int, top_k: int, experts: int,
        ep_size: int, dtype: torch.dtype,
    ) -> FusedUse:  # fmt: skip
        """A use on this machine: its product, and its HCCL_BUFFSIZE."""
        name = torch.get_device_module(device).get_device_name(device.index)
        product = npu_product(str(name))
        algorithm = _USUAL_ALGORITHM.get(product, "")
        text = os.environ.get("HCCL_BUFFSIZE", str(_BUFFER))
        buffer = int(text) if text.isdigit() else 0
        return cls(product, algorithm, tokens, hidden, top_k, experts, ep_size, dtype, buffer)

    @property
    def unmet(self) -> list[Check]:
        """The checks that are not met."""
        return [check for check in fused_checks(self) if not check.met]


class Check(NamedTuple):
    """One documented constraint.

    Attributes:
        name: What is constrained.
        found: What it is.
        allowed: What it may be.
        met: Whether it is.
    """

    name: str
    found: str
    allowed: str
    met: bool

    def __str__(self) -> str:
        """One line for a user."""
        return f"{self.name} is {self.found}, allowed {self.allowed}"


def fused_checks(use: FusedUse) -> list[Check]:
    """Every documented constraint of the fused pair; it may be used where all are met."""
    limits = _LIMITS.get((use.product, use.algorithm))
    known = ", ".join(f"{product} {algorithm}" for product, algorithm in _LIMITS)
    product = Check("product", f"{use.product} {use.algorithm}", known, limits is not None)
    if limits is None:
        return [product]
    low, high, step = limits.hidden.start, limits.hidden[-1], limits.hidden.step
    local, rest = divmod(use.experts, use.ep_size)
    checks = [
        product,
        Check("dtype", str(use.dtype), "float16 or bfloat16", use.dtype in _SENT),
        Check(
            "hidden size",
            str(use.hidden),
            f"{low} to {high}" + (f" in steps of {step}" if step > 1 else ""),
            use.hidden in limits.hidden,
        ),
        _at_most("tokens of a process", use.tokens, limits.tokens),
        _at_most("experts a token", use.top_k, min(limits.top_k, use.experts)),
        Check(
            "expert-parallel processes",
            str(use.ep_size),
            limits.ep_sizes_text,
            use.ep_size in limits.ep_sizes,
        ),
        _at_most("routed experts", use.experts, _MOST_EXPERTS),
        Check("experts", str(use.experts), f"a multiple of {use.ep_size}", rest == 0),
    ]
    needed = -(-_buffer_bytes(use, local) // _MIB)
    checks.append(
        Check("HCCL_BUFFSIZE", str(use.buffer), f"{needed} or more", use.buffer >= needed)
    )
    return checks


def grouped_matmul_checks(
    product: str, *, experts: int, inner: int, outer: int, dtype: torch.dtype
) -> list[Check]:
    """Documented constraints of `npu_grouped_matmul` on tokens that are sorted by expert.

    Args:
        product: A2, A3 or 310P.
        experts: Experts of the process, one group of rows each.
        inner: Columns of the rows.
        outer: Columns of the products.
        dtype: Type of both.
    """
    types = (torch.float16,) if product == "310P" else (*_SENT, torch.float32)
    names = " or ".join(str(kind).removeprefix("torch.") for kind in types)
    return [
        Check("product", product, "A2, A3 or 310P", product in ("A2", "A3", "310P")),
        Check("dtype", str(dtype), names, dtype in types),
        Check("experts of a process", str(experts), "2 to 128", 2 <= experts <= 128),
        _at_most("columns of the rows", inner, 65535),
        _at_most("columns of the products", outer, 65535),
    ]


def has_grouped_matmul(experts: int, inner: int, outer: int, dtype: torch.dtype) -> bool:
    """Whether `grouped_matmul` may be used on A2 and A3, whose constraints are the same."""
    checks = grouped_matmul_checks("A2", experts=experts, inner=inner, outer=outer, dtype=dtype)
    return all(check.met for check in checks)


def grouped_matmul(rows_NX: Tensor, matrices_EXY: Tensor, counts_E: Tensor) -> Tensor:
    """Rows that are sorted by expert, times their experts' matrices, shape (N, Y); no gradient.

    Args:
        rows_NX: Rows, shape (N, X); products of those beyond the sum of the counts mean nothing.
        matrices_EXY: A matrix for each expert, shape (E, X, Y).
        counts_E: Rows of every expert (int64), on the device.
    """
    product_NY: Tensor
    # One tensor of rows and one of products; rows are in groups, whose sizes are given.
    (product_NY,) = import_torch_npu().npu_grouped_matmul(
        [rows_NX],
        [matrices_EXY],
        group_list=counts_E,
        split_item=3,
        group_type=0,
        group_list_type=1,
    )
    return product_NY


_SENT = (torch.float16, torch.bfloat16)


def _at_most(name: str, found: int, most: int) -> Check:
    return Check(name, str(found), f"1 to {most}", 1 <= found <= most)


def _buffer_bytes(use: FusedUse, local_experts: int) -> int:
    """Bytes that HCCL_BUFFSIZE must hold."""
    wide = 2 * use.hidden
    if use.product == "A2" and use.algorithm == "fullmesh":
        most = min(local_experts, use.top_k)
        return 2 * (use.tokens * use.ep_size * most * wide + 2 * _MIB)
    if use.product == "A2":
        routes = 4 * _up(use.top_k, 8) * 4
        return use.experts * use.tokens * (wide + routes) + 104 * _MIB
    message = _up(wide, 32) + 64
    row = -(-message // 480) * 512 if use.algorithm == "fullmesh_v2" else _up(message, 512)
    received = local_experts * use.tokens * use.ep_size * row
    # The operators' default of one shared expert counts, though no process holds it.
    return 2 * (received + (use.top_k + 1) * use.tokens * _up(wide, 512))


def _up(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


@dataclass(frozen=True, slots=True)
class FusedPair:
    """The two operators on their own communicator.

    Attributes:
        use: What they are used for; all of its checks are met.
        group: HCCL's name of the communicator.
        ep_rank: Index of this process in it.
    """

    use: FusedUse
    group: str
    ep_rank: int

    @classmethod
    def create(
        cls, use: FusedUse, ranks: list[list[int]], *, timeout: timedelta | None = None
    ) -> FusedPair:
        """Make the communicator: once, by all processes of the run, before they compute.

        Args:
            use: What they are used for.
            ranks: The processes of every communicator of the run.
            timeout: How long processes wait for each other; torch's default, if None.

        Raises:
            ParallelError: A documented constraint is not met, or the algorithm is hierarchy, whose
                dispatch takes and gives more.
        """
        if use.algorithm == "hierarchy":
            raise ParallelError(
                "the fused dispatch with hierarchy is not supported",
                hint="use fullmesh on A2, fullmesh_v1 or fullmesh_v2 on A3",
            )
        if use.unmet:
            raise ParallelError(
                f"the fused dispatch and combine cannot be used: {'; '.join(map(str, use.unmet))}",
                hint="use the plain collectives",
            )
        group: Any = own_group(ranks, timeout, shared=False)
        ep_rank = dist.get_rank(group)
        name = group._get_backend(torch.device("npu")).get_hccl_comm_name(ep_rank)
        return cls(use, str(name), ep_rank)

    def dispatch(self, x_TI: Tensor, experts_Tk: Tensor) -> Dispatched:
        """Send tokens to the processes that own their experts.

        Args:
            x_TI: This process's tokens, shape (T, I), float16 or bfloat16.
            experts_Tk: Their experts, shape (T, k), none twice in a row.

        Raises:
            ParallelError: There is no token, or more than the communicator was made for.
        """
        if not 1 <= len(x_TI) <= self.use.tokens:
            raise ParallelError(
                f"{len(x_TI)} tokens for the fused dispatch, expected 1 to {self.use.tokens}",
                hint="make the pair for as many tokens as a process has at most",
            )
        expert_ids = experts_Tk.int()
        rows, _, assist, counts, ep_counts, tp_counts, _ = (
            import_torch_npu().npu_moe_distribute_dispatch_v2(
                x_TI, expert_ids, **self._common(), expert_token_nums_type=1
            )
        )
        return Dispatched(rows, counts, expert_ids, assist, ep_counts, tp_counts)

    def combine(self, rows_AI: Tensor, sent: Dispatched, weights_Tk: Tensor) -> Tensor:
        """Bring rows back to the processes of their tokens; weighted sums, shape (T, I).

        Args:
            rows_AI: What the experts made of the rows, in their order and type.
            sent: What `dispatch` gave.
            weights_Tk: Routing weights of this process's tokens, shape (T, k).
        """
        tp = {"tp_send_counts": sent.tp_counts} if self.use.product == "A3" else {}
        combined: Tensor = import_torch_npu().npu_moe_distribute_combine_v2(
            rows_AI, sent.expert_ids, sent.assist, sent.ep_counts, weights_Tk.float(),
            **self._common(), **tp,
        )  # fmt: skip
        return combined

    def _common(self) -> dict[str, Any]:
        """Arguments of both operators."""
        # An A3 takes its own communicator as that of a TP group of one, as vllm-ascend passes it.
        tp = {"group_tp": self.group, "tp_world_size": 1, "tp_rank_id": 0}
        # The empty name is fullmesh_v1, also for releases that know no other.
        algorithm = "" if self.use.algorithm == "fullmesh_v1" else self.use.algorithm
        return {
            "group_ep": self.group,
            "ep_world_size": self.use.ep_size,
            "ep_rank_id": self.ep_rank,
            "moe_expert_num": self.use.experts,
            "global_bs": self.use.tokens * self.use.ep_size,
            "comm_alg": algorithm,
            **(tp if self.use.product == "A3" else {}),
        }


class Dispatched(NamedTuple):
    """Rows that a process received, and what bringing them back needs.

    Attributes:
        rows: Tokens sorted by the process's experts, shape (A, I); beyond the sum of the counts
            they mean nothing.
        counts: Rows of every expert of the process (int64).
        expert_ids: Experts of the tokens that were sent.
        assist: Where the rows came from, in the operators' own form.
        ep_counts: Rows by expert and sender.
        tp_counts: The same of a TP group.
    """

    rows: Tensor
    counts: Tensor
    expert_ids: Tensor
    assist: Tensor
    ep_counts: Tensor
    tp_counts: Tensor

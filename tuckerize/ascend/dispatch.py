"""Ascend's fused dispatch and combine of expert parallelism: their constraints and their use.

`npu_moe_distribute_dispatch_v2` sends each token to the processes that own its experts;
`npu_moe_distribute_combine_v2` returns the results and sums them with the routing weights. They run
on A2 and A3 only, for inference only, in pairs, and on a communicator of their own. Row counts stay
on the device: there is no host synchronisation.

Source: torch_npu 2.13 (schemas); CANN's ops-transformer, MoeDistributeDispatchV2 and CombineV2
(constraints), August 2026.
"""

from __future__ import annotations

import os
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tuckerize.ascend.constraints import HALF_TYPES, Constraint, at_most
from tuckerize.ascend.environment import generation_of, hccl_buffer_mib
from tuckerize.ascend.npu import import_torch_npu
from tuckerize.errors import ParallelError

ROW_STEP = 32
"""Rows are padded with zeros to a multiple of this width, so that any width can be sent."""

_MIB = 2**20


class _Limits(NamedTuple):
    """Limits of one algorithm on one generation."""

    hidden: range
    max_tokens: int
    max_top_k: int
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
_MAX_EXPERTS = 1024

# Within a node; the operators' own default.
_DEFAULT_ALGORITHM = {"A2": "fullmesh", "A3": "fullmesh_v1"}


@dataclass(frozen=True, slots=True)
class FusedUse:
    """Sizes and settings of the fused pair, the same in all layers and on all processes.

    Attributes:
        generation: NPU generation: A2 or A3; no other has the operators.
        algorithm: `comm_alg`: fullmesh or hierarchy on A2; fullmesh_v1, fullmesh_v2 or hierarchy
            on A3.
        max_tokens: Largest number of tokens per process.
        hidden: Width of the rows sent.
        top_k: Experts per token.
        num_experts: Routed experts per layer.
        ep_size: Expert-parallel processes.
        dtype: Type of the rows sent.
        buffer_mib: HCCL_BUFFSIZE in MiB.
    """

    generation: str
    algorithm: str
    max_tokens: int
    hidden: int
    top_k: int
    num_experts: int
    ep_size: int
    dtype: torch.dtype = torch.bfloat16
    buffer_mib: int = hccl_buffer_mib({})

    @classmethod
    def on(
        cls, device: torch.device, *, max_tokens: int, hidden: int, top_k: int, num_experts: int,
        ep_size: int, dtype: torch.dtype,
    ) -> FusedUse:  # fmt: skip
        """Sizes and settings on this machine, with its generation and its HCCL_BUFFSIZE."""
        name = torch.get_device_module(device).get_device_name(device.index)
        generation = generation_of(str(name))
        return cls(
            generation, _DEFAULT_ALGORITHM.get(generation, ""), max_tokens, hidden, top_k,
            num_experts, ep_size, dtype, hccl_buffer_mib(os.environ),
        )  # fmt: skip

    @property
    def unmet(self) -> list[Constraint]:
        """The constraints that are not met."""
        return [constraint for constraint in fused_constraints(self) if not constraint.met]


def fused_constraints(use: FusedUse) -> list[Constraint]:
    """Documented constraints of the fused pair, which may be used where all are met."""
    limits = _LIMITS.get((use.generation, use.algorithm))
    known = ", ".join(f"{generation} {algorithm}" for generation, algorithm in _LIMITS)
    generation = Constraint(
        "generation", f"{use.generation} {use.algorithm}", known, limits is not None
    )
    if limits is None:
        return [generation]
    low, high, step = limits.hidden.start, limits.hidden[-1], limits.hidden.step
    local, rest = divmod(use.num_experts, use.ep_size)
    needed = -(-_buffer_bytes(use, local) // _MIB)
    return [
        generation,
        Constraint("dtype", str(use.dtype), "float16 or bfloat16", use.dtype in HALF_TYPES),
        Constraint(
            "hidden size",
            str(use.hidden),
            f"{low} to {high}" + (f" in steps of {step}" if step > 1 else ""),
            use.hidden in limits.hidden,
        ),
        at_most("tokens per process", use.max_tokens, limits.max_tokens),
        at_most("experts per token", use.top_k, min(limits.max_top_k, use.num_experts)),
        Constraint(
            "expert-parallel processes",
            str(use.ep_size),
            limits.ep_sizes_text,
            use.ep_size in limits.ep_sizes,
        ),
        at_most("routed experts", use.num_experts, _MAX_EXPERTS),
        Constraint("experts", str(use.num_experts), f"a multiple of {use.ep_size}", rest == 0),
        Constraint(
            "HCCL_BUFFSIZE",
            str(use.buffer_mib),
            f"{needed} or more",
            use.buffer_mib >= needed,
        ),
    ]


def _buffer_bytes(use: FusedUse, local_experts: int) -> int:
    """Smallest HCCL_BUFFSIZE, in bytes."""
    wide = 2 * use.hidden
    if use.generation == "A2" and use.algorithm == "fullmesh":
        copies = min(local_experts, use.top_k)
        return 2 * (use.max_tokens * use.ep_size * copies * wide + 2 * _MIB)
    if use.generation == "A2":
        routes = 4 * _up(use.top_k, 8) * 4
        return use.num_experts * use.max_tokens * (wide + routes) + 104 * _MIB
    message = _up(wide, 32) + 64
    row = -(-message // 480) * 512 if use.algorithm == "fullmesh_v2" else _up(message, 512)
    received = local_experts * use.max_tokens * use.ep_size * row
    # The operators count one shared expert by default, although no process holds it.
    return 2 * (received + (use.top_k + 1) * use.max_tokens * _up(wide, 512))


def _up(number: int, multiple: int) -> int:
    """Round up to a multiple."""
    return -(-number // multiple) * multiple


@dataclass(frozen=True, slots=True)
class FusedPair:
    """The two operators on their own communicator.

    Attributes:
        use: Sizes and settings; all constraints are met.
        communicator: HCCL's name of the communicator.
        ep_rank: Index of this process in it.
    """

    use: FusedUse
    communicator: str
    ep_rank: int

    @classmethod
    def create(cls, use: FusedUse, group: dist.ProcessGroup) -> FusedPair:
        """Hand a communicator over to the operators: once per run, before the first layer.

        Args:
            use: Sizes and settings.
            group: The expert-parallel processes, on a communicator that nothing else uses
                (`parallel.mesh.new_group_along`).

        Raises:
            ParallelError: A documented constraint is not met, or the algorithm is hierarchy, whose
                dispatch has further arguments and results.
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
        backend: Any = group._get_backend(torch.device("npu"))
        return cls(use, str(backend.get_hccl_comm_name(group.rank())), group.rank())

    def dispatch(self, x_TI: Tensor, experts_Tk: Tensor) -> Dispatched:
        """Send tokens to the processes that own their experts.

        Args:
            x_TI: Tokens of this process, shape (T, I), float16 or bfloat16.
            experts_Tk: Experts of each token, shape (T, k), distinct within a row.

        Raises:
            ParallelError: There are no tokens, or more than `max_tokens`.
        """
        if not 1 <= len(x_TI) <= self.use.max_tokens:
            raise ParallelError(
                f"{len(x_TI)} tokens for the fused dispatch, expected 1 to {self.use.max_tokens}",
                hint="create the pair for the largest number of tokens per process",
            )
        expert_ids = experts_Tk.int()
        rows, _, assist, counts, ep_counts, tp_counts, _ = (
            import_torch_npu().npu_moe_distribute_dispatch_v2(
                x_TI, expert_ids, **self._common(), expert_token_nums_type=1
            )
        )
        return Dispatched(rows, counts, expert_ids, assist, ep_counts, tp_counts)

    def combine(self, rows_AI: Tensor, sent: Dispatched, weights_Tk: Tensor) -> Tensor:
        """Return results to the processes of their tokens and sum them, weighted, shape (T, I).

        Args:
            rows_AI: Results for the rows that `dispatch` returned, in their order and type.
            sent: Result of `dispatch`.
            weights_Tk: Routing weights of this process's tokens, shape (T, k).
        """
        tp = {"tp_send_counts": sent.tp_counts} if self.use.generation == "A3" else {}
        combined: Tensor = import_torch_npu().npu_moe_distribute_combine_v2(
            rows_AI, sent.expert_ids, sent.assist, sent.ep_counts, weights_Tk.float(),
            **self._common(), **tp,
        )  # fmt: skip
        return combined

    def _common(self) -> dict[str, Any]:
        """Arguments of both operators."""
        # On A3 the same communicator serves as a TP group of one, as in vllm-ascend.
        tp = {"group_tp": self.communicator, "tp_world_size": 1, "tp_rank_id": 0}
        # The empty name means fullmesh_v1 in every release.
        algorithm = "" if self.use.algorithm == "fullmesh_v1" else self.use.algorithm
        return {
            "group_ep": self.communicator,
            "ep_world_size": self.use.ep_size,
            "ep_rank_id": self.ep_rank,
            "moe_expert_num": self.use.num_experts,
            "global_bs": self.use.max_tokens * self.use.ep_size,
            "comm_alg": algorithm,
            **(tp if self.use.generation == "A3" else {}),
        }


class Dispatched(NamedTuple):
    """Rows that a process received, and the arguments that combining them needs.

    Attributes:
        rows: Tokens sorted by local expert, shape (A, I); undefined beyond the sum of the counts.
        counts: Rows per local expert, int64.
        expert_ids: Experts of the tokens that this process sent.
        assist: Origin of the rows, in the operators' own form.
        ep_counts: Rows by expert and sender.
        tp_counts: The same for a TP group.
    """

    rows: Tensor
    counts: Tensor
    expert_ids: Tensor
    assist: Tensor
    ep_counts: Tensor
    tp_counts: Tensor

"""The fused dispatch and combine of the stand-in: their documented semantics on gloo.

Rows that an operator does not promise to fill are NaN here, so that nobody relies on them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from . import npu

P = ParamSpec("P")
T = TypeVar("T")

# Groups of gloo by HCCL's names of their communicators.
COMMUNICATORS: dict[str, Any] = {}


def _on_the_device(work: Callable[P, T]) -> Callable[P, T]:
    """What the real ones do on the device is done on the host here, and is not counted."""

    @wraps(work)
    def uncounted(*arguments: P.args, **settings: P.kwargs) -> T:
        marked = npu.device.mark(False)
        try:
            return work(*arguments, **settings)
        finally:
            npu.device.mark(marked)

    return uncounted


@_on_the_device
def npu_moe_distribute_dispatch_v2(
    x: Tensor,
    expert_ids: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    group_tp: str = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
    comm_alg: str = "",
) -> tuple[Tensor, ...]:
    """Send tokens to the processes of their experts; the seven results of the real one."""
    gloo = _communicator(group_ep, ep_world_size, ep_rank_id, moe_expert_num)
    _check(x.dtype in (torch.float16, torch.bfloat16), f"x is {x.dtype}")
    _check(expert_ids.dtype == torch.int32, f"expert_ids are {expert_ids.dtype}")
    ids_Tk = expert_ids.cpu().long()
    for row in ids_Tk.tolist():
        _check(len(set(row)) == len(row), f"an expert is twice in {row}")
    _check(global_bs == 0 or len(x) * ep_world_size <= global_bs, f"global_bs is {global_bs}")
    local, top_k = moe_expert_num // ep_world_size, ids_Tk.shape[1]
    # Routes sorted by expert, and so by the process that owns it.
    order_N = ids_Tk.flatten().argsort(stable=True)
    tokens_N, slots_N = order_N // top_k, order_N % top_k
    expert_N = ids_Tk.flatten()[order_N]
    sizes = torch.bincount(expert_N // local, minlength=ep_world_size).tolist()
    rank_N = torch.full_like(order_N, ep_rank_id)
    routes_N4 = torch.stack([expert_N % local, rank_N, tokens_N, slots_N], dim=1)
    received_M4, incoming = _all_to_all(gloo, routes_N4, sizes)
    rows_MI, _ = _all_to_all(gloo, x.cpu()[tokens_N], sizes, incoming)
    # By expert, then by sender.
    order_M = received_M4[:, 0].argsort(stable=True)
    received_M4, rows_MI = received_M4[order_M], rows_MI[order_M]
    most = (global_bs or len(x) * ep_world_size) * min(local, top_k)
    expanded_AI = x.cpu().new_full((most, x.shape[1]), torch.nan)
    expanded_AI[: len(rows_MI)] = rows_MI
    assist_A128 = torch.full((most, 128), -1, dtype=torch.int32)
    assist_A128[: len(rows_MI), :4] = received_M4.int()
    counts_E = torch.bincount(received_M4[:, 0], minlength=local)
    by_sender = torch.bincount(
        received_M4[:, 0] * ep_world_size + received_M4[:, 1], minlength=local * ep_world_size
    )
    if expert_token_nums_type == 0:
        counts_E = counts_E.cumsum(0)
    nothing = torch.zeros(1)
    results = (
        expanded_AI,
        nothing,
        assist_A128.flatten(),
        counts_E,
        by_sender.cumsum(0).int(),
        nothing.int(),
        nothing,
    )
    return tuple(result.to(x.device) for result in results)


@_on_the_device
def npu_moe_distribute_combine_v2(  # noqa: PLR0917 the real one's
    expand_x: Tensor,
    expert_ids: Tensor,
    assist_info_for_combine: Tensor,
    ep_send_counts: Tensor,
    expert_scales: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    tp_send_counts: Tensor | None = None,
    group_tp: str = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    global_bs: int = 0,
    comm_alg: str = "",
) -> Tensor:
    """Bring rows back and sum them with the routing weights."""
    gloo = _communicator(group_ep, ep_world_size, ep_rank_id, moe_expert_num)
    _check(expand_x.dtype in (torch.float16, torch.bfloat16), f"expand_x is {expand_x.dtype}")
    _check(expert_scales.dtype == torch.float32, f"expert_scales are {expert_scales.dtype}")
    count = int(ep_send_counts[-1])
    routes_M4 = assist_info_for_combine.cpu().view(-1, 128)[:count, :4].long()
    order_M = routes_M4[:, 1].argsort(stable=True)
    routes_M4, rows_MI = routes_M4[order_M], expand_x.cpu()[:count][order_M]
    sizes = torch.bincount(routes_M4[:, 1], minlength=ep_world_size).tolist()
    routes_N4, incoming = _all_to_all(gloo, routes_M4, sizes)
    rows_NI, _ = _all_to_all(gloo, rows_MI, sizes, incoming)
    weights_N = expert_scales.cpu()[routes_N4[:, 2], routes_N4[:, 3]]
    total_TI = torch.zeros(len(expert_ids), expand_x.shape[1])
    total_TI.index_add_(0, routes_N4[:, 2], weights_N[:, None] * rows_NI.float())
    return total_TI.to(expand_x.device, expand_x.dtype)


def _communicator(name: str, size: int, rank: int, experts: int) -> Any:  # noqa: ANN401
    _check(name in COMMUNICATORS, f"there is no communicator {name}")
    gloo = COMMUNICATORS[name]
    _check((gloo.size(), gloo.rank()) == (size, rank), f"{name} has other processes")
    _check(experts % size == 0, f"{experts} experts on {size} processes")
    return gloo


def _all_to_all(
    gloo: Any,  # noqa: ANN401
    rows: Tensor,
    sizes: list[int],
    incoming: list[int] | None = None,
) -> tuple[Tensor, list[int]]:
    """Send the first `sizes[0]` rows to process 0, and so on; returns rows and their numbers."""
    if incoming is None:
        counts = torch.empty(len(sizes), dtype=torch.long)
        gloo.alltoall_base(counts, torch.tensor(sizes), [], []).wait()
        incoming = counts.tolist()
    received = rows.new_empty((sum(incoming), rows.shape[1]))
    gloo.alltoall_base(received, rows.contiguous(), incoming, sizes).wait()
    return received, incoming


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(f"stand-in NPU: {message}")

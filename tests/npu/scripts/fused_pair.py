"""Under torchrun: the fused pair on the stand-in NPU against the naive sum, as JSON of errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[3]))

from tuckerize.ascend.dispatch import FusedPair, FusedUse
from tuckerize.domain import Device
from tuckerize.parallel.backends import choose_device
from tuckerize.parallel.processes import process_group

EXPERTS, HIDDEN, TOP_K, MOST_TOKENS = 8, 1024, 3, 7


def naive_sum(x_TI: Tensor, experts_Tk: Tensor, weights_Tk: Tensor, matrices: Tensor) -> Tensor:
    """Every token through its experts in float64, whose results are sent in bfloat16."""
    output_TI = torch.zeros(x_TI.shape, dtype=torch.float64)
    for token, (x_I, experts, weights) in enumerate(zip(x_TI, experts_Tk, weights_Tk, strict=True)):
        for expert, weight in zip(experts.tolist(), weights.tolist(), strict=True):
            result_I = (x_I.double() @ matrices[expert].double()).bfloat16()
            output_TI[token] += weight * result_I.double()
    return output_TI


def error_of(generation: str, algorithm: str, tokens: int) -> float:
    """Relative error of this process's tokens after a round trip."""
    size, rank = dist.get_world_size(), dist.get_rank()
    use = FusedUse(generation, algorithm, MOST_TOKENS, HIDDEN, TOP_K, EXPERTS, size)
    pair = FusedPair.create(use, dist.new_group())
    shared = torch.Generator().manual_seed(0)
    matrices = torch.randn((EXPERTS, HIDDEN, HIDDEN), generator=shared) / HIDDEN**0.5
    own = torch.Generator().manual_seed(1 + rank)
    x_TI = torch.randn((tokens, HIDDEN), generator=own).bfloat16()
    weights_Tk, experts_Tk = torch.rand((tokens, EXPERTS), generator=own).topk(TOP_K, dim=1)
    sent = pair.dispatch(x_TI.to("npu"), experts_Tk.to("npu"))
    local = EXPERTS // size
    rows, results = sent.rows, []
    for expert, count in enumerate(sent.counts.tolist()):
        matrix = matrices[rank * local + expert].to("npu")
        results.append((rows[:count].float() @ matrix).bfloat16())
        rows = rows[count:]
    combined_TI = pair.combine(torch.cat([*results, rows]), sent, weights_Tk.to("npu"))
    expected_TI = naive_sum(x_TI, experts_Tk, weights_Tk, matrices)
    return float((combined_TI.cpu().double() - expected_TI).norm() / expected_TI.norm())


def refusal() -> str:
    """What another collective on the communicator of a pair says."""
    group = dist.new_group()
    backend = group._get_backend(torch.device("npu"))
    dist.all_reduce(torch.ones(1, device="npu"), group=group)
    backend.get_hccl_comm_name(dist.get_rank())
    try:
        dist.all_reduce(torch.ones(1, device="npu"), group=group)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return ""


if __name__ == "__main__":
    with process_group(lambda local: choose_device(Device.NPU, local_rank=local)) as (processes, _):
        # The last process has fewer tokens.
        tokens = MOST_TOKENS - 4 * (processes.rank == processes.size - 1)
        errors = {
            f"{generation} {algorithm}": max(
                processes.gather(error_of(generation, algorithm, tokens))
            )
            for generation, algorithm in (("A2", "fullmesh"), ("A3", "fullmesh_v1"))
        }
        refused = refusal()
        if processes.is_leader:
            sys.stdout.write(json.dumps({"errors": errors, "refused": refused}))
            sys.stdout.flush()

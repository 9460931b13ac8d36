"""Under torchrun: sharded layers with the fused pair on the stand-in NPU, as JSON by layer.

Every layer is computed in bfloat16 with the pair, with the plain collectives, and as a whole in
float64; what waits for the host is counted in each of the first two.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch_npu
from torch import Tensor

from tuckerize.moe.family import Glu
from tuckerize.runtime.activations import activation_of

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.distributed.layer_cases import Case, dense, make_group, own_slices
from tuckerize.ascend.dispatch import ROW_STEP, FusedPair, FusedUse
from tuckerize.domain import Device, Layout, MultilinearRank, StackShape
from tuckerize.errors import ParallelError
from tuckerize.parallel.backends import choose_device
from tuckerize.parallel.collectives import counted
from tuckerize.parallel.layouts import Collective, layer_traffic, width_over_ep
from tuckerize.parallel.mesh import Position, make_mesh, new_group_along, own_tokens
from tuckerize.parallel.processes import process_group
from tuckerize.pipeline.verify.traffic import load_of
from tuckerize.runtime.sharded import ShardedExperts

EXPERTS, TOP_K, TOKENS = 8, 3, 24

WHOLE, GROUPS = StackShape(8, 16, 96), StackShape(2, 16, 96)
LATENT = Case(Layout.INTERMEDIATE, MultilinearRank(8, 16, 40), WHOLE, joint=True)
CASES = {
    "latent": LATENT,
    "wide": replace(LATENT, rank=MultilinearRank(8, 16, 96), joint=False),
    "groups": replace(LATENT, rank=MultilinearRank(2, 16, 40), shape=GROUPS),
    "all modes": Case(Layout.RANK, MultilinearRank(6, 11, 40), WHOLE, joint=False),
    "sequence parallel": replace(LATENT, sequence_parallel=True),
    "unequal widths": replace(LATENT, widths=(16, 12, 20, 16, 13, 19, 15, 17)),
}


def found_of(case: Case, pair: FusedPair, mesh: Any) -> dict[str, Any]:  # noqa: ANN401
    """What one layer gives on this process."""
    position = Position.on(mesh, sequence_parallel=case.sequence_parallel)
    generator = torch.Generator().manual_seed(0)
    groups = [
        {n: t.bfloat16().double() for n, t in make_group(case, generator).items()}
        for _ in case.sizes.ranks
    ]
    x_TI = torch.randn(TOKENS, case.shape.hidden, generator=generator).bfloat16()
    weights_Tk, experts_Tk = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOP_K, dim=1)
    shares_TE = torch.zeros(TOKENS, EXPERTS, dtype=torch.float64)
    shares_TE.scatter_add_(1, experts_Tk, weights_Tk.double())
    own_T = own_tokens(TOKENS, position)
    expected_TI = dense(case, groups, x_TI.double(), shares_TE)[own_T]
    arguments = [t[own_T].to("npu") for t in (x_TI, experts_Tk, weights_Tk)]
    result: dict[str, Any] = {}
    for name, fused in (("fused", pair), ("plain", None)):
        layer = ShardedExperts(
            [{n: t.bfloat16() for n, t in g.items()} for g in own_slices(case, groups, position)],
            layout=case.layout,
            sizes=case.sizes,
            position=position,
            activation=activation_of(Glu()),
            fused=fused,
        ).to("npu")
        output_TI, waits, sent = forward(layer, arguments)
        error = (output_TI - expected_TI).norm() / expected_TI.norm()
        result[name] = {"error": float(error), "waits": waits, "sent": sent}
    load = load_of(experts_Tk, case.sizes, position.parallelism)
    sizes = (case.layout, case.sizes, position.parallelism, load)
    moved = layer_traffic(*sizes, value_bytes=2, fused_width=pair.use.hidden)
    result["predicted"] = moved[Collective.ALL_TO_ALL] * TOKENS / position.ep.size
    return result


@torch.no_grad()
def forward(layer: ShardedExperts, arguments: list[Tensor]) -> tuple[Tensor, int, float]:
    """Output on the host in float64, how often it waited for the host, and bytes sent over ep."""
    with torch_npu.region() as waits:
        output_TI = layer(*arguments)
    with counted() as moved:
        again_TI = layer(*arguments)
    assert torch.equal(output_TI.cpu(), again_TI.cpu())
    return output_TI.cpu().double(), sum(waits.values()), moved[Collective.ALL_TO_ALL]


def left_to_the_plain_collectives(pair: FusedPair, mesh: Any) -> list[str]:  # noqa: ANN401
    """The operators are not called with gradients or in float32, and refuse too many tokens."""
    layer = ShardedExperts(
        own_slices(LATENT, [make_group(LATENT, torch.Generator())], Position.on(mesh)),
        layout=LATENT.layout,
        sizes=LATENT.sizes,
        position=Position.on(mesh),
        activation=activation_of(Glu()),
        fused=pair,
    ).to("npu", torch.float32)
    experts_Tk = torch.arange(TOKENS * TOP_K).view(TOKENS, TOP_K) % EXPERTS
    x_TI, weights_Tk = torch.ones(TOKENS, 96), torch.ones(TOKENS, TOP_K)
    called: list[str] = []
    dispatch = torch_npu.npu_moe_distribute_dispatch_v2
    for name, dtype, gradients, tokens in (
        ("float32", torch.float32, False, 4),
        ("gradients", torch.bfloat16, True, 4),
        ("inference", torch.bfloat16, False, 4),
        ("too many tokens", torch.bfloat16, False, TOKENS),
    ):

        def noted(*words: Any, name: str = name, **options: Any) -> Any:  # noqa: ANN401
            called.append(name)
            return dispatch(*words, **options)

        torch_npu.npu_moe_distribute_dispatch_v2 = noted
        layer.requires_grad_(gradients)
        chosen = [t[:tokens].to("npu") for t in (x_TI.to(dtype), experts_Tk, weights_Tk)]
        try:
            with torch.set_grad_enabled(gradients):
                layer(*chosen)
        except ParallelError as error:
            called.append(error.message)
    torch_npu.npu_moe_distribute_dispatch_v2 = dispatch
    return called


if __name__ == "__main__":
    with process_group(lambda local: choose_device(Device.NPU, local_rank=local)) as (
        processes,
        device,
    ):
        tp = int(os.environ["TP"])
        ep = processes.size // tp
        mesh = make_mesh("npu", tp=tp, ep=ep)
        parallelism = Position.on(mesh).parallelism
        widest = max(width_over_ep(c.layout, c.sizes, parallelism) for c in CASES.values())
        use = FusedUse.on(
            device, max_tokens=TOKENS // ep, hidden=-(-widest // ROW_STEP) * ROW_STEP,
            top_k=TOP_K, num_experts=EXPERTS, ep_size=ep, dtype=torch.bfloat16,
        )  # fmt: skip
        pair = FusedPair.create(use, new_group_along(mesh, "ep"))
        found = {name: found_of(case, pair, mesh) for name, case in CASES.items()}
        everything = processes.gather(found)
        called = left_to_the_plain_collectives(pair, mesh)
        dist.barrier()
        if processes.is_leader:
            sys.stdout.write(json.dumps({"found": everything, "called": called}))
            sys.stdout.flush()

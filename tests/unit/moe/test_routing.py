from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

from tuckerize.errors import CheckpointError
from tuckerize.moe.families import FAMILIES
from tuckerize.moe.routing import Router, route


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("method", "groups", "top_groups"),
    [
        ("greedy", 1, 1),
        ("group_limited_greedy", 4, 2),
        ("group_limited_greedy", 4, 1),
        ("group_limited_greedy", 2, 2),
    ],
)
def test_route_equals_the_router_of_transformers(
    method: str, groups: int, top_groups: int, dtype: torch.dtype
) -> None:
    config = DeepseekV2Config(
        hidden_size=32,
        n_routed_experts=16,
        num_experts_per_tok=3,
        topk_method=method,
        n_group=groups,
        topk_group=top_groups,
        routed_scaling_factor=2.5,
    )
    generator = torch.Generator().manual_seed(1)
    router = DeepseekV2TopkRouter(config)
    router.weight.data = torch.randn(16, 32, generator=generator).to(dtype)
    x = torch.randn(50, 32, generator=generator).to(dtype)
    _, weights, experts = router(x)
    routes = route(x, Router(router.weight.data), FAMILIES["deepseek_v2"].routing(config.to_dict()))
    order, own_order = experts.argsort(dim=1), routes.experts.argsort(dim=1)
    assert torch.equal(routes.experts.gather(1, own_order), experts.gather(1, order))
    torch.testing.assert_close(
        routes.weights.gather(1, own_order), weights.gather(1, order).detach(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("top_k", [0, 17])
def test_softmax_route_that_does_not_work_out_is_refused(top_k: int) -> None:
    config = {"num_experts": 16, "num_experts_per_tok": top_k}
    with pytest.raises(CheckpointError, match=r"num_experts_per_tok|of 16 experts"):
        FAMILIES["olmoe"].routing(config)


def test_route_without_tokens_gives_none() -> None:
    routing = FAMILIES["deepseek_v2"].routing({"num_experts_per_tok": 2, "n_routed_experts": 8})
    routes = route(torch.zeros(0, 4), Router(torch.zeros(8, 4)), routing)
    assert routes.experts.shape == routes.weights.shape == (0, 2)

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from tuckerize.ascend.dispatch import FusedPair, FusedUse, fused_constraints
from tuckerize.errors import ParallelError

# DeepSeek-V2-Lite on a node of 8.
A2 = FusedUse("A2", "fullmesh", max_tokens=64, hidden=2048, top_k=6, num_experts=64, ep_size=8)
A2_HIERARCHY = replace(A2, algorithm="hierarchy", ep_size=16)
A3 = replace(A2, generation="A3", algorithm="fullmesh_v1")
A3_V2 = replace(A3, algorithm="fullmesh_v2")
A3_HIERARCHY = replace(A3, algorithm="hierarchy")
ENOUGH = 10**6


def unmet(use: FusedUse) -> list[str]:
    return [str(one) for one in fused_constraints(use) if not one.met]


@pytest.mark.parametrize("use", [A2, A2_HIERARCHY, A3, A3_V2, A3_HIERARCHY])
def test_fused_pair_may_be_used_where_everything_is_met(use: FusedUse) -> None:
    assert unmet(use) == []


@pytest.mark.parametrize(
    ("base", "allowed", "refused", "message"),
    [
        (
            A2,
            {"hidden": 7168},
            {"hidden": 7200},
            "hidden size is 7200, allowed 32 to 7168 in steps of 32",
        ),
        (
            A2,
            {"hidden": 32},
            {"hidden": 48},
            "hidden size is 48, allowed 32 to 7168 in steps of 32",
        ),
        (
            A2_HIERARCHY,
            {"hidden": 10240},
            {"hidden": 10272},
            "hidden size is 10272, allowed 32 to 10240 in steps of 32",
        ),
        (A3, {"hidden": 1024}, {"hidden": 1023}, "hidden size is 1023, allowed 1024 to 8192"),
        (A3, {"hidden": 8192}, {"hidden": 8193}, "hidden size is 8193, allowed 1024 to 8192"),
        (
            A2,
            {"max_tokens": 256},
            {"max_tokens": 257},
            "tokens per process is 257, allowed 1 to 256",
        ),
        (
            A2_HIERARCHY,
            {"max_tokens": 512},
            {"max_tokens": 513},
            "tokens per process is 513, allowed 1 to 512",
        ),
        (
            A3,
            {"max_tokens": 512},
            {"max_tokens": 513},
            "tokens per process is 513, allowed 1 to 512",
        ),
        (
            A3_V2,
            {"max_tokens": 256},
            {"max_tokens": 257},
            "tokens per process is 257, allowed 1 to 256",
        ),
        (
            A3_HIERARCHY,
            {"max_tokens": 1},
            {"max_tokens": 0},
            "tokens per process is 0, allowed 1 to 256",
        ),
        (A2, {"top_k": 16}, {"top_k": 17}, "experts per token is 17, allowed 1 to 16"),
        (A3_V2, {"top_k": 12}, {"top_k": 13}, "experts per token is 13, allowed 1 to 12"),
        (
            A2,
            {"top_k": 8, "num_experts": 8},
            {"top_k": 9, "num_experts": 8},
            "experts per token is 9, allowed 1 to 8",
        ),
        (
            A2,
            {"ep_size": 2},
            {"ep_size": 1},
            "expert-parallel processes is 1, allowed 2 to 8, 16, 32, 64, 128, 256",
        ),
        (
            A2,
            {"ep_size": 64},
            {"ep_size": 9, "num_experts": 63},
            "expert-parallel processes is 9, allowed 2 to 8, 16, 32, 64, 128, 256",
        ),
        (
            A2_HIERARCHY,
            {"ep_size": 64},
            {"ep_size": 8},
            "expert-parallel processes is 8, allowed 16, 32, 64",
        ),
        (
            A3,
            {"ep_size": 768, "num_experts": 768},
            {"ep_size": 769, "num_experts": 769},
            "expert-parallel processes is 769, allowed 2 to 768",
        ),
        (
            A2,
            {"num_experts": 1024},
            {"num_experts": 1032},
            "routed experts is 1032, allowed 1 to 1024",
        ),
        (A2, {"num_experts": 72}, {"num_experts": 65}, "experts is 65, allowed a multiple of 8"),
        (
            A2,
            {"dtype": torch.float16},
            {"dtype": torch.float32},
            "dtype is torch.float32, allowed float16 or bfloat16",
        ),
    ],
)
def test_fused_check_at_its_bound(
    base: FusedUse, allowed: dict[str, Any], refused: dict[str, Any], message: str
) -> None:
    assert unmet(replace(base, buffer_mib=ENOUGH, **allowed)) == []
    assert unmet(replace(base, buffer_mib=ENOUGH, **refused)) == [message]


@pytest.mark.parametrize(
    ("generation", "algorithm"), [("910A", "fullmesh"), ("A2", "fullmesh_v2"), ("A3", "fullmesh")]
)
def test_fused_pair_of_a_generation_that_lacks_it(generation: str, algorithm: str) -> None:
    assert unmet(replace(A2, generation=generation, algorithm=algorithm)) == [
        f"generation is {generation} {algorithm}, allowed A2 fullmesh, A2 hierarchy, "
        "A3 fullmesh_v1, A3 fullmesh_v2, A3 hierarchy"
    ]


# Worked out by hand from the documented formulas, in bytes.
A2_BYTES = 2 * (64 * 8 * 6 * 2048 * 2 + 2 * 2**20)
A2_HIERARCHY_BYTES = 64 * 64 * (2048 * 2 + 4 * 8 * 4) + 104 * 2**20
A3_BYTES = 2 * (8 * 64 * 8 * 4608 + 7 * 64 * 4096)  # Align512(4096 + 64) = 4608
A3_V2_BYTES = 2 * (8 * 64 * 8 * 4608 + 7 * 64 * 4096)  # (4160 + 479) // 480 = 9, times 512


@pytest.mark.parametrize(
    ("use", "needed"),
    [
        (A2, A2_BYTES),
        (A2_HIERARCHY, A2_HIERARCHY_BYTES),
        (A3, A3_BYTES),
        (A3_V2, A3_V2_BYTES),
        # (14336 + 64 + 511) // 512 = 29 and (14336 + 64 + 479) // 480 = 30 blocks of 512
        (replace(A3, hidden=7168), 2 * (8 * 64 * 8 * 29 * 512 + 7 * 64 * 14336)),
        (replace(A3_V2, hidden=7168), 2 * (8 * 64 * 8 * 30 * 512 + 7 * 64 * 14336)),
    ],
)
def test_fused_check_of_the_buffer(use: FusedUse, needed: int) -> None:
    mebibytes = -(-needed // 2**20)
    assert unmet(replace(use, buffer_mib=mebibytes)) == []
    assert unmet(replace(use, buffer_mib=mebibytes - 1)) == [
        f"HCCL_BUFFSIZE is {mebibytes - 1}, allowed {mebibytes} or more"
    ]


def test_fused_pair_that_may_not_be_used_is_refused_with_what_is_not_met() -> None:
    with pytest.raises(ParallelError) as caught:
        FusedPair.create(replace(A3, hidden=512, top_k=17), dist.ProcessGroup(HashStore(), 0, 8))
    assert caught.value.message == (
        "the fused dispatch and combine cannot be used: hidden size is 512, allowed 1024 to 8192; "
        "experts per token is 17, allowed 1 to 16"
    )


def test_fused_pair_with_hierarchy_is_refused() -> None:
    with pytest.raises(ParallelError, match="with hierarchy is not supported"):
        FusedPair.create(A2_HIERARCHY, dist.ProcessGroup(HashStore(), 0, 8))


@pytest.mark.parametrize("tokens", [0, 65])
def test_fused_dispatch_of_more_tokens_than_the_pair_was_made_for_is_refused(tokens: int) -> None:
    pair = FusedPair(A2, "name of a communicator", 0)
    experts_Tk = torch.zeros(tokens, 6, dtype=torch.int64)
    with pytest.raises(ParallelError, match=f"{tokens} tokens .* expected 1 to 64"):
        pair.dispatch(torch.zeros(tokens, 2048, dtype=torch.bfloat16), experts_Tk)

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tuckerize.ascend.dispatch import FusedPair, FusedUse, fused_checks, grouped_matmul_checks
from tuckerize.errors import ParallelError

# DeepSeek-V2-Lite on a node of 8.
A2 = FusedUse("A2", "fullmesh", tokens=64, hidden=2048, top_k=6, experts=64, ep_size=8)
A2_HIERARCHY = replace(A2, algorithm="hierarchy", ep_size=16)
A3 = replace(A2, product="A3", algorithm="fullmesh_v1")
A3_V2 = replace(A3, algorithm="fullmesh_v2")
A3_HIERARCHY = replace(A3, algorithm="hierarchy")
ENOUGH = 10**6


def unmet(use: FusedUse) -> list[str]:
    return [str(check) for check in fused_checks(use) if not check.met]


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
        (A2, {"tokens": 256}, {"tokens": 257}, "tokens of a process is 257, allowed 1 to 256"),
        (
            A2_HIERARCHY,
            {"tokens": 512},
            {"tokens": 513},
            "tokens of a process is 513, allowed 1 to 512",
        ),
        (A3, {"tokens": 512}, {"tokens": 513}, "tokens of a process is 513, allowed 1 to 512"),
        (A3_V2, {"tokens": 256}, {"tokens": 257}, "tokens of a process is 257, allowed 1 to 256"),
        (A3_HIERARCHY, {"tokens": 1}, {"tokens": 0}, "tokens of a process is 0, allowed 1 to 256"),
        (A2, {"top_k": 16}, {"top_k": 17}, "experts a token is 17, allowed 1 to 16"),
        (A3_V2, {"top_k": 12}, {"top_k": 13}, "experts a token is 13, allowed 1 to 12"),
        (
            A2,
            {"top_k": 8, "experts": 8},
            {"top_k": 9, "experts": 8},
            "experts a token is 9, allowed 1 to 8",
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
            {"ep_size": 9, "experts": 63},
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
            {"ep_size": 768, "experts": 768},
            {"ep_size": 769, "experts": 769},
            "expert-parallel processes is 769, allowed 2 to 768",
        ),
        (A2, {"experts": 1024}, {"experts": 1032}, "routed experts is 1032, allowed 1 to 1024"),
        (A2, {"experts": 72}, {"experts": 65}, "experts is 65, allowed a multiple of 8"),
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
    assert unmet(replace(base, buffer=ENOUGH, **allowed)) == []
    assert unmet(replace(base, buffer=ENOUGH, **refused)) == [message]


@pytest.mark.parametrize(
    ("product", "algorithm"), [("910A", "fullmesh"), ("A2", "fullmesh_v2"), ("A3", "fullmesh")]
)
def test_fused_pair_of_a_product_that_lacks_it(product: str, algorithm: str) -> None:
    assert unmet(replace(A2, product=product, algorithm=algorithm)) == [
        f"product is {product} {algorithm}, allowed A2 fullmesh, A2 hierarchy, A3 fullmesh_v1, "
        "A3 fullmesh_v2, A3 hierarchy"
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
    assert unmet(replace(use, buffer=mebibytes)) == []
    assert unmet(replace(use, buffer=mebibytes - 1)) == [
        f"HCCL_BUFFSIZE is {mebibytes - 1}, allowed {mebibytes} or more"
    ]


@pytest.mark.parametrize(
    ("changed", "messages"),
    [
        ({}, []),
        ({"product": "910A"}, ["product is 910A, allowed A2, A3 or 310P"]),
        ({"dtype": torch.float32}, []),
        (
            {"dtype": torch.float64},
            ["dtype is torch.float64, allowed float16 or bfloat16 or float32"],
        ),
        ({"product": "310P"}, ["dtype is torch.bfloat16, allowed float16"]),
        ({"experts": 1}, ["experts of a process is 1, allowed 2 to 128"]),
        ({"experts": 129}, ["experts of a process is 129, allowed 2 to 128"]),
        ({"inner": 65536}, ["columns of the rows is 65536, allowed 1 to 65535"]),
        ({"outer": 65536}, ["columns of the products is 65536, allowed 1 to 65535"]),
    ],
)
def test_grouped_matmul_checks(changed: dict[str, Any], messages: list[str]) -> None:
    use = {"product": "A2", "experts": 8, "inner": 2048, "outer": 1408, "dtype": torch.bfloat16}
    checks = grouped_matmul_checks(**{**use, **changed})
    assert [str(check) for check in checks if not check.met] == messages


def test_fused_pair_that_may_not_be_used_is_refused_with_what_is_not_met() -> None:
    with pytest.raises(ParallelError) as caught:
        FusedPair.create(replace(A3, hidden=512, top_k=17), [[0, 1]])
    assert caught.value.message == (
        "the fused dispatch and combine cannot be used: hidden size is 512, allowed 1024 to 8192; "
        "experts a token is 17, allowed 1 to 16"
    )


def test_fused_pair_with_hierarchy_is_refused() -> None:
    with pytest.raises(ParallelError, match="with hierarchy is not supported"):
        FusedPair.create(A2_HIERARCHY, [[0, 1]])


@pytest.mark.parametrize("tokens", [0, 65])
def test_fused_dispatch_of_more_tokens_than_the_pair_was_made_for_is_refused(tokens: int) -> None:
    pair = FusedPair(A2, "name of a communicator", 0)
    experts_Tk = torch.zeros(tokens, 6, dtype=torch.int64)
    with pytest.raises(ParallelError, match=f"{tokens} tokens .* expected 1 to 64"):
        pair.dispatch(torch.zeros(tokens, 2048, dtype=torch.bfloat16), experts_Tk)

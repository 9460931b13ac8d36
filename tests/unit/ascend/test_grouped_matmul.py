from __future__ import annotations

from typing import Any

import pytest
import torch

from tuckerize.ascend.grouped_matmul import grouped_matmul_constraints, has_grouped_matmul


@pytest.mark.parametrize(
    ("changed", "messages"),
    [
        ({}, []),
        ({"generation": "910A"}, ["generation is 910A, allowed A2, A3 or 310P"]),
        ({"dtype": torch.float32}, []),
        (
            {"dtype": torch.float64},
            ["dtype is torch.float64, allowed float16 or bfloat16 or float32"],
        ),
        ({"generation": "310P"}, ["dtype is torch.bfloat16, allowed float16"]),
        ({"num_experts": 1}, ["experts per process is 1, allowed 2 to 128"]),
        ({"num_experts": 129}, ["experts per process is 129, allowed 2 to 128"]),
        ({"inner": 65536}, ["columns of the rows is 65536, allowed 1 to 65535"]),
        ({"outer": 65536}, ["columns of the products is 65536, allowed 1 to 65535"]),
    ],
)
def test_grouped_matmul_constraints(changed: dict[str, Any], messages: list[str]) -> None:
    use: dict[str, Any] = {
        "generation": "A2",
        "num_experts": 8,
        "inner": 2048,
        "outer": 1408,
        "dtype": torch.bfloat16,
    }
    constraints = grouped_matmul_constraints(**{**use, **changed})
    assert [str(one) for one in constraints if not one.met] == messages


def test_has_grouped_matmul_where_the_constraints_of_a2_and_a3_are_met() -> None:
    sizes: dict[str, Any] = {"inner": 2048, "outer": 1408, "dtype": torch.bfloat16}
    assert has_grouped_matmul(8, **sizes)
    assert not has_grouped_matmul(129, **sizes)
    assert not has_grouped_matmul(8, **{**sizes, "dtype": torch.float64})

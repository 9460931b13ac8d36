"""Under torchrun: transformers splits a Tucker checkpoint; logits and gradients stay the same.

torchrun --nproc-per-node 2 tests/distributed/transformers_tp.py OUT OUT ...
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

import tuckerize  # noqa: F401  makes transformers know the format

torch.set_num_threads(1)


def main() -> None:
    """Compare split models with whole ones."""
    for folder in sys.argv[1:]:
        compare(folder)
    refuse_expert_parallelism(sys.argv[1])


def compare(folder: str) -> None:
    """Compare one split model with the whole one."""
    ids = torch.arange(3, 43)[None]
    split = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, distributed_config=DistributedConfig(tp_size=2)
    )
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found, expected = split(ids).logits, whole(ids).logits
    error = float((gathered(found) - expected).norm() / expected.norm())
    assert error < 1e-5, error
    owned = 0
    for name, value in whole.named_parameters():
        part = split.get_parameter(name)
        if ".experts." in name:
            rows = getattr(part, "to_local", lambda part=part: part)().shape[-2]
            owned += rows < value.shape[-2]
            assert rows == value.shape[-2] or abs(2 * rows - value.shape[-2]) <= 1
    assert owned
    compare_gradients(split, whole)


def compare_gradients(split: PreTrainedModel, whole: PreTrainedModel) -> None:
    """Compare what two backwards leave in every parameter, and the logits after a step."""
    ids = torch.randint(3, 60, (1, 200), generator=torch.Generator().manual_seed(0))
    for model in (split, whole):
        model.train()
        for _ in range(2):  # gradients are added up
            model(ids, labels=ids).loss.backward()
    errors = {}
    for name, parameter in whole.named_parameters():
        assert parameter.grad is not None, name
        found = gathered(split.get_parameter(name).grad)
        difference = found - own_part(parameter.grad, found)
        errors[name] = float(difference.norm() / parameter.grad.norm().clamp_min(1e-6))
    assert {name: error for name, error in errors.items() if not error < 1e-4} == {}
    for model in (split, whole):
        torch.optim.SGD(model.parameters(), lr=0.01, foreach=False).step()
    with torch.no_grad():
        found, expected = gathered(split(ids).logits), whole(ids).logits
    assert (found - expected).norm() / expected.norm() < 1e-4


def own_part(whole: Tensor, found: Tensor) -> Tensor:
    """What one of two processes has; 5.14 splits parameters without telling torch."""
    for dimension, (own, size) in enumerate(zip(found.shape, whole.shape, strict=True)):
        if own != size:
            whole = whole.narrow(dimension, dist.get_rank() * (size - own), own)
    return whole


def gathered(tensor: Any) -> Tensor:  # noqa: ANN401
    """The whole of a tensor that may be split."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def refuse_expert_parallelism(folder: str) -> None:
    """transformers must not share out experts that it does not know."""
    plan = DistributedConfig(tp_size=2, enable_expert_parallel=True)
    with pytest.raises(ValueError, match="expert"):
        AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan)


if __name__ == "__main__":
    main()

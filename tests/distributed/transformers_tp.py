"""Under torchrun: transformers splits a Tucker checkpoint, whose logits stay the same.

torchrun --nproc-per-node 2 tests/distributed/transformers_tp.py OUT OUT ...
"""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM
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
    if hasattr(found, "full_tensor"):
        found = found.full_tensor()
    error = float((found - expected).norm() / expected.norm())
    assert error < 1e-5, error
    owned = 0
    for name, value in whole.named_parameters():
        part = split.get_parameter(name)
        if ".experts." in name:
            rows = getattr(part, "to_local", lambda part=part: part)().shape[-2]
            owned += rows < value.shape[-2]
            assert rows == value.shape[-2] or abs(2 * rows - value.shape[-2]) <= 1
    assert owned


def refuse_expert_parallelism(folder: str) -> None:
    """transformers must not share out experts that it does not know."""
    plan = DistributedConfig(tp_size=2, enable_expert_parallel=True)
    with pytest.raises(ValueError, match="expert"):
        AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan)


if __name__ == "__main__":
    main()

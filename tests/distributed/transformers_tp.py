"""Under torchrun: transformers splits a Tucker checkpoint, whose logits stay the same.

torchrun --nproc-per-node 2 tests/distributed/transformers_tp.py OUT OUT ...
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

import tuckerize  # noqa: F401  makes transformers know the format
from tuckerize.runtime.experts import TuckerExperts

torch.set_num_threads(1)


def main() -> None:
    """Compare split models with whole ones."""
    for folder in sys.argv[1:]:
        compare(folder)


def compare(folder: str) -> None:
    """Compare one split model with the whole one."""
    ids = torch.arange(3, 43)[None]
    plan = DistributedConfig(tp_size=2, tp_plan="auto")
    split = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, distributed_config=plan
    )
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found, expected = split(ids).logits, whole(ids).logits
    if hasattr(found, "full_tensor"):
        found = found.full_tensor()
    error = float((found - expected).norm() / expected.norm())
    assert error < 1e-5, error
    for module in split.modules():
        if isinstance(module, TuckerExperts):
            owned = [value for value in module.parameters() if hasattr(value, "to_local")]
            assert owned
            for value in owned:
                rows = value.to_local().shape[-2]
                assert abs(2 * rows - value.shape[-2]) <= 1


if __name__ == "__main__":
    main()

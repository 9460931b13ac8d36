"""Several decompositions and verifications by the same processes.

torchrun --nproc-per-node 2 -m tests.distributed.several_calls MODEL FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch.distributed as dist

from tuckerize import DecomposeRequest, ShardRequest, VerifyRequest, decompose, shard, verify
from tuckerize.errors import ParallelError


def main(model: Path, folder: Path) -> None:
    """Decompose twice, verify three times, and once where it is refused."""
    for rank in ("4,16,16", "2,8,8"):
        decompose(DecomposeRequest(model=model, output=folder / rank, rank=rank))
        if os.environ["RANK"] == "0":
            shard(ShardRequest(folder=folder / rank, tp=2))
    for rank in ("4,16,16", "2,8,8", "4,16,16"):
        assert verify(VerifyRequest(folder=folder / rank)).passed
    dist.init_process_group("gloo")
    try:
        verify(VerifyRequest(folder=folder / "2,8,8"))
    except ParallelError as error:
        sys.stdout.write(f"refused: {error}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

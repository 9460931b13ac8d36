"""Under torchrun: load shards with torch's own distributed checkpoint reader onto another mesh.

Usage: reshard_with_dcp.py SHARDS OUTPUT. Every tensor is loaded as a DTensor split on dimension 0
over the processes of this run; each process saves its part.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def main() -> None:
    """Load and save."""
    shards, output = Path(sys.argv[1]), Path(sys.argv[2])
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    reader = HuggingFaceStorageReader(str(shards))
    metadata = reader.read_metadata().state_dict_metadata
    state = {
        name: distribute_tensor(torch.zeros(entry.size, dtype=torch.bfloat16), mesh, [Shard(0)])
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(state, storage_reader=reader)
    parts = {}
    for name, tensor in state.items():
        if not isinstance(tensor, DTensor):
            raise TypeError(name)
        parts[name] = tensor.to_local()
    output.mkdir(exist_ok=True)
    torch.save(parts, output / f"{dist.get_rank()}.pt")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()

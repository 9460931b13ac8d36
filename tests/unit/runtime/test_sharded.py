from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.expert_cases import SWIGLU
from tuckerize import DecomposeRequest, ShardRequest, decompose, shard
from tuckerize.checkpoint.output import MANIFEST
from tuckerize.errors import CheckpointError, ParallelError
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.parallel.mesh import Position, make_mesh
from tuckerize.runtime.experts import TuckerExperts
from tuckerize.runtime.sharded import ShardedExperts


@pytest.fixture(scope="module")
def tucker(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Tucker checkpoint whose layer 2 is decomposed, sharded for one process."""
    out = tmp_path_factory.mktemp("sharded") / "out"
    decompose(DecomposeRequest(model=tiny_model, rank="6,18,26", layers="2", output=out))
    shard(ShardRequest(folder=out, tp=1))
    return out


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield make_mesh("cpu", tp=1)
    dist.destroy_process_group()


def test_from_shards_of_one_process_is_the_whole_layer(tucker: Path, mesh: DeviceMesh) -> None:
    sharded = ShardedExperts.from_shards(tucker, 2, mesh)
    opened = TuckerCheckpoint.open(tucker)
    whole = TuckerExperts([opened.read_group(2, 0)], group_size=8, activation=SWIGLU)
    x_TI = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    experts_Tk = torch.arange(18).view(9, 2) % 8
    weights_Tk = torch.full((9, 2), 0.5)
    output_TI = sharded(x_TI, experts_Tk, weights_Tk)
    assert torch.equal(output_TI, whole(x_TI, experts_Tk, weights_Tk))
    assert sharded.state_dict().keys() == whole.state_dict().keys()


def test_from_shards_on_a_mesh_with_only_some_axes_takes_one_process_of_the_others(
    tucker: Path, mesh: DeviceMesh
) -> None:
    del mesh
    plain = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    assert ShardedExperts.from_shards(tucker, 2, plain).position.ep.size == 1


def test_from_shards_after_the_processes_have_left_is_refused(tucker: Path) -> None:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    mesh = make_mesh("cpu", tp=1)
    dist.destroy_process_group()
    with pytest.raises(ParallelError, match="need a process group"):
        ShardedExperts.from_shards(tucker, 2, mesh)


def test_from_shards_of_a_layer_that_is_dense_is_refused(tucker: Path, mesh: DeviceMesh) -> None:
    with pytest.raises(CheckpointError, match=r"layer 1 of .* is not decomposed") as caught:
        ShardedExperts.from_shards(tucker, 1, mesh)
    assert caught.value.hint == "decomposed layers: 2"


def test_from_shards_of_another_version_is_refused(
    tucker: Path, mesh: DeviceMesh, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    (copy / "tp1").mkdir(parents=True)
    (copy / MANIFEST).write_text((tucker / MANIFEST).read_text())
    value = json.loads((tucker / "tp1" / MANIFEST).read_text())
    value["tucker_manifest_sha256"] = "0" * 64
    (copy / "tp1" / MANIFEST).write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match="was cut from another version") as caught:
        ShardedExperts.from_shards(copy, 2, mesh)
    assert caught.value.hint == f"run: tuckerize shard {copy} --tp 1 --overwrite"


def test_position_on_a_mesh_knows_the_backend_of_its_axes(mesh: DeviceMesh) -> None:
    position = Position.on(mesh, sequence_parallel=True)
    assert position.ep.group is not None
    assert position.parallelism.all_to_all
    assert position.parallelism.sequence_parallel

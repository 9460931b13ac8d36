from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tuckerize.checkpoint.output import MANIFEST
from tuckerize.checkpoint.writer import write_tensors
from tuckerize.domain import Layout
from tuckerize.errors import CheckpointError, ParallelError
from tuckerize.format.manifest import available_shardings
from tuckerize.format.shards import Sharding
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.parallel.layouts import Parallelism
from tuckerize.parallel.mesh import Axis, Position

GOLDEN = Path(__file__).parents[2] / "golden" / "v0.1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a checkpoint with two groups a layer and shards for tp 2 and tp x ep = 2 x 2."""
    return Path(shutil.copytree(GOLDEN / "data-free", tmp_path / "data-free"))


def at(tp_rank: int, ep_rank: int = 0, *, tp: int = 2, ep: int = 1) -> Position:
    return Position(tp=Axis(rank=tp_rank, size=tp), ep=Axis(rank=ep_rank, size=ep))


def test_available_shardings_are_the_finished_ones(folder: Path) -> None:
    (folder / "tp8").mkdir()
    expected = {"tp2": Parallelism(2, 1), "tp2-ep2": Parallelism(2, 2)}
    assert available_shardings(folder) == expected


def test_shards_of_a_folder_and_of_an_open_checkpoint_are_the_same(folder: Path) -> None:
    tucker = TuckerCheckpoint.open(folder)
    for ep in (1, 2):
        found = Sharding.open(folder, tp=2, ep=ep)
        assert found == Sharding.of(tucker, Parallelism(2, ep))
        assert found.mesh == Parallelism(2, ep)
    assert Sharding.of(tucker, Parallelism(2, 1, cp=3)).mesh.cp == 3


def test_shards_open_without_the_weights_of_their_checkpoint(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    assert len(Sharding.open(folder, tp=2, ep=1).read_layer(1, at(0))) == 2


def test_shards_for_another_mesh_are_refused_with_the_command(folder: Path) -> None:
    with pytest.raises(ParallelError, match="has no shards for tp x ep = 2 x 4") as caught:
        Sharding.open(folder, tp=2, ep=4)
    assert caught.value.hint == f"run: tuckerize shard {folder} --tp 2 --ep 4"


def test_shards_of_a_family_that_is_not_known_are_refused(folder: Path) -> None:
    manifest = folder / MANIFEST
    manifest.write_text(manifest.read_text().replace("deepseek_v2", "deepseek_v9"))
    with pytest.raises(CheckpointError, match="of the family 'deepseek_v9', which is unknown"):
        Sharding.open(folder, tp=2, ep=1)


def test_slices_of_all_processes_concatenated_are_the_layer(folder: Path) -> None:
    tucker, sharding = TuckerCheckpoint.open(folder), Sharding.open(folder, tp=2, ep=1)
    assert sharding.layout == Layout.RANK
    owned = [sharding.read_layer(2, at(tp_rank)) for tp_rank in range(2)]
    for group, (first, second) in enumerate(zip(*owned, strict=True)):
        whole = tucker.read_group(2, group)
        assert first.keys() == second.keys() == whole.keys()
        split = 0
        for name, tensor in whole.items():
            sizes = zip(first[name].shape, tensor.shape, strict=True)
            cut = [dim for dim, (own, size) in enumerate(sizes) if own != size]
            split += len(cut)
            if cut:
                assert torch.equal(torch.cat([first[name], second[name]], *cut), tensor)
            else:
                assert torch.equal(first[name], tensor)
                assert torch.equal(second[name], tensor)
        assert split >= 4


def test_processes_of_ep_read_their_own_groups(folder: Path) -> None:
    tucker, sharding = TuckerCheckpoint.open(folder), Sharding.open(folder, tp=2, ep=2)
    for ep_rank in range(2):
        [group] = sharding.read_layer(1, at(0, ep_rank, ep=2))
        whole = tucker.read_group(1, ep_rank)
        shared = [name for name, tensor in whole.items() if group[name].shape == tensor.shape]
        assert shared
        assert all(torch.equal(group[name], whole[name]) for name in shared)


def test_layer_that_is_dense_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"layer 0 of .* is not decomposed") as caught:
        Sharding.open(folder, tp=2, ep=1).read_layer(0, at(0))
    assert caught.value.hint == "decomposed layers: 1, 2"


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.experts.group_1.gate_proj.core", "group_0.gate_proj.core", "x"]
)
def test_shard_with_another_tensor_is_refused(folder: Path, name: str) -> None:
    sharding = Sharding.open(folder, tp=2, ep=1)
    file = sharding.folder / sharding.manifest.shards[0].file.name
    write_tensors(file, {name: torch.zeros(1)})
    module = r"model\.layers\.1\.mlp\.experts\.group_0"
    with pytest.raises(CheckpointError, match=f"holds {name}, which is not of {module}"):
        sharding.read_layer(1, at(0))

"""Shards of any mesh on disk: nothing is lost, and a mesh that does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tuckerize import DecomposeRequest, ShardRequest, VerifyRequest, decompose, shard, verify
from tuckerize.errors import ParallelError, UsageError
from tuckerize.format.manifest import available_shardings
from tuckerize.format.shards import find_sharding
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "latent": {"rank": "full,full,20", "joint": "gate_up"},
    "all modes": {"rank": "6,18,26"},
    "groups": {"rank": "full,20,12", "group_size": 2},
}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def tucker(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A Tucker checkpoint."""
    out = tmp_path_factory.mktemp("shard") / "out"
    decompose(DecomposeRequest(model=tiny_model, output=out, **CHECKPOINTS[request.param]))
    return out


def routed_tensors(tucker: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in tucker.glob("*.safetensors")
        for name, tensor in load_file(path).items()
        if ".experts." in name
    }


@pytest.mark.parametrize("layout", ["rank", "intermediate"])
@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (1, 4), (2, 2), (3, 2)])
def test_shard_files_put_at_their_offsets_are_the_whole_tensors(
    tucker: Path, tp: int, ep: int, layout: str
) -> None:
    report = shard(ShardRequest(folder=tucker, tp=tp, ep=ep, layout=layout, overwrite=True))
    folder = tucker / (f"tp{tp}-ep{ep}" if ep > 1 else f"tp{tp}")
    assert report.folder == str(folder)
    whole = routed_tensors(tucker)
    rebuilt = {name: torch.full_like(tensor, torch.nan) for name, tensor in whole.items()}
    owned: dict[tuple[str, str], int] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        places = json.loads(metadata["DCP_SHARDING_INFO"])
        owner = (metadata["ep_rank"], metadata["tp_rank"])
        for name, tensor in load_file(path).items():
            starts = places[name]["saved_offsets"]
            own = [slice(s, s + n) for s, n in zip(starts, tensor.shape, strict=True)]
            rebuilt[name][tuple(own)] = tensor
            owned[owner] = owned.get(owner, 0) + tensor.nbytes
    assert len(owned) == tp * ep
    for name, tensor in whole.items():
        assert torch.equal(rebuilt[name], tensor), name
    (cost,) = (cost for cost in report.costs if cost.layout == layout)
    assert cost.bytes_per_process == max(owned.values())


def test_shard_of_experts_that_do_not_divide_is_refused_with_sizes_that_do(tucker: Path) -> None:
    groups = TuckerCheckpoint.open(tucker).manifest.groups
    what, fitting = ("4 groups", "1, 2, 4") if groups > 1 else ("8 experts", "1, 2, 4, 8")
    with pytest.raises(UsageError, match=f"--ep 3 does not divide the {what} of a layer") as uneven:
        shard(ShardRequest(folder=tucker, tp=2, ep=3))
    assert f"--ep can be {fitting}" in uneven.value.hint
    with pytest.raises(UsageError, match="--ep 0 is not a number of processes"):
        shard(ShardRequest(folder=tucker, tp=2, ep=0))


def test_find_sharding_takes_the_mesh_that_was_named_or_the_one_that_fits(
    tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    decompose(DecomposeRequest(model=tiny_model, output=out, **CHECKPOINTS["latent"]))
    for tp, ep in ((2, 2), (1, 4), (2, 1), (1, 2)):
        shard(ShardRequest(folder=out, tp=tp, ep=ep))
    tucker = TuckerCheckpoint.open(out)
    assert len(available_shardings(out)) == 4

    def folder(processes: int, tp: int | None, ep: int | None, cp: int) -> str:
        return find_sharding(tucker, processes, tp=tp, ep=ep, cp=cp).folder.name

    assert folder(2, None, None, 1) == "tp2"
    assert folder(4, None, None, 2) == "tp2"
    assert folder(4, 2, None, 1) == folder(4, None, 2, 1) == folder(8, 2, 2, 2) == "tp2-ep2"
    with pytest.raises(ParallelError, match="several shardings for 4 processes") as several:
        folder(4, None, None, 1)
    assert f"verify {out} --tp 2 --ep 2" in several.value.hint
    with pytest.raises(ParallelError, match="4 processes are not tp x ep x cp = 2 x 1 x 1"):
        folder(4, 2, 1, 1)
    with pytest.raises(ParallelError, match="has no shards for tp x ep = 4 x 2") as missing:
        folder(8, 4, 2, 1)
    assert missing.value.hint == f"run: tuckerize shard {out} --tp 4 --ep 2"


def test_verify_on_a_mesh_without_torchrun_is_refused(tucker: Path) -> None:
    with pytest.raises(UsageError, match="a mesh needs processes") as caught:
        verify(VerifyRequest(folder=tucker, tp=2, ep=2))
    assert "torchrun --nproc-per-node 4 -m tuckerize verify" in caught.value.hint

"""Checkpoints that are unlike a fresh download, through the whole job."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.running import files_of
from tests.tiny_families import make_family
from tests.tiny_models import make_tiny_model
from tuckerize import (
    DecomposeRequest,
    ReconstructRequest,
    ShardRequest,
    VerifyRequest,
    decompose,
    inspect,
    reconstruct,
    shard,
    verify,
)
from tuckerize.errors import CheckpointError

FULL = "full,full,full"
IDS = torch.arange(3, 43)[None]


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: Tensor = model(IDS).logits
    return found


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    model = make_family(tmp_path / "model", "qwen3_moe", tie_word_embeddings=True)
    out = tmp_path / "out"
    decompose(DecomposeRequest(model=model, rank=FULL, output=out))
    names = {name for path in out.glob("*.safetensors") for name in load_file(path)}
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    torch.testing.assert_close(logits(out), logits(model), rtol=1e-4, atol=1e-5)


def test_snapshot_of_the_cache_is_read_through_its_links(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", shards=True)
    cached = tmp_path / "models--owner--name"
    snapshot, blobs = cached / "snapshots" / "abc", cached / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for place, path in enumerate(sorted(model.iterdir())):
        shutil.copy(path, blobs / f"{place:040x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{place:040x}")
    before = files_of(cached)
    for source, name in ((model, "plain"), (snapshot, "linked")):
        decompose(DecomposeRequest(model=source, keep=0.75, output=tmp_path / name))
    assert files_of(cached) == before
    plain, linked = (files_of(tmp_path / name) for name in ("plain", "linked"))
    assert not any(path.is_symlink() for path in (tmp_path / "linked").rglob("*"))
    # Manifest and card name the source.
    weights = {name for name in plain if name.endswith(".safetensors")}
    assert weights
    assert all(linked[name] == plain[name] for name in weights)


def test_pruned_checkpoint_may_have_any_number_of_experts(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", experts=5, dtype=torch.float32)
    out, dense = tmp_path / "out", tmp_path / "dense"
    decompose(DecomposeRequest(model=model, rank=FULL, output=out))
    assert inspect(out).shape.experts == 5
    torch.testing.assert_close(logits(out), logits(model), rtol=1e-4, atol=1e-5)
    shard(ShardRequest(folder=out, tp=2))
    assert verify(VerifyRequest(folder=out)).passed
    reconstruct(ReconstructRequest(folder=out, output=dense))
    found, expected = (
        {
            name: own
            for path in folder.glob("*.safetensors")
            for name, own in load_file(path).items()
        }
        for folder in (dense, model)
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_dense_model_is_refused_by_name(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="the configuration names no experts"):
        inspect(tmp_path / "model")

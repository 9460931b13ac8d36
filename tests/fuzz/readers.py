"""What is fuzzed: a file of a small checkpoint, and the commands that read it."""

from __future__ import annotations

import gzip
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet

from tests.tiny_models import add_tokenizer, make_tiny_model
from tuckerize import (
    DecomposeRequest,
    GenerateRequest,
    ReconstructRequest,
    ShardRequest,
    check,
    decompose,
    generate,
    inspect,
    preview,
    reconstruct,
    shard,
)
from tuckerize.calibration.documents import Reader as TextReader
from tuckerize.calibration.layer_profile import LayerProfile
from tuckerize.calibration.profile_pass import ProfileCache
from tuckerize.calibration.stream import StreamedModel
from tuckerize.calibration.text import TextSource, read_windows
from tuckerize.checkpoint.files import describe_file
from tuckerize.checkpoint.output import OutputFolder
from tuckerize.checkpoint.reader import Checkpoint
from tuckerize.format.card import write_hub_files
from tuckerize.format.manifest import read_tucker_manifest
from tuckerize.format.shards import Sharding
from tuckerize.moe.source import SourceModel
from tuckerize.recipe_reader import read_recipe

MODEL, OUT, DENSE, TEXTS = "model", "out", "dense", "texts"
CACHE, UNFINISHED = "cache", "unfinished"
PLAN = {"recipe": {"rules": [{"keep": 0.5}]}, "weights": {"model.safetensors": "1"}}


@dataclass(frozen=True, slots=True)
class Reader:
    """A file, as a pattern relative to the working folder, and what reads it."""

    file: str
    read: Callable[[Path], object]

    def path(self, work: Path) -> Path:
        """The file; the first, if there are several."""
        return min(work.glob(self.file))


def _open(work: Path) -> None:
    Checkpoint.open(work / MODEL).bytes  # noqa: B018
    preview(DecomposeRequest(model=work / MODEL, keep=0.7))


def _tensors(work: Path) -> None:
    checkpoint = Checkpoint.open(work / MODEL)
    for _ in checkpoint.read(checkpoint.tensors):
        pass


def _stream(work: Path) -> None:
    source = SourceModel.open(work / MODEL)
    StreamedModel.open(source.checkpoint, source.moe.family, device=torch.device("cpu"))


def _tucker(work: Path) -> None:
    inspect(work / OUT)


def _shards(work: Path) -> None:
    check(work / OUT)
    Sharding.open(work / OUT, tp=2, ep=1)


def _recipe(work: Path) -> None:
    recipe = read_recipe(work / "recipe.yaml")
    preview(DecomposeRequest(model=work / MODEL, recipe=recipe.model_dump(exclude_none=True)))


def _card(work: Path) -> None:
    manifest = read_tucker_manifest(work / OUT)
    write_hub_files(work / MODEL, work / TEXTS, manifest, {"architectures": ["A"]})


def _cache(work: Path) -> None:
    cache = ProfileCache(work / CACHE, "key", str)
    cache.load_states()
    cache.load(1)


def _continue(work: Path) -> None:
    folder = Path(shutil.copytree(work / UNFINISHED, work / "continued"))
    try:
        output = OutputFolder(folder)
        with output.claim(PLAN, overwrite=False):
            output.record("piece")
    finally:
        shutil.rmtree(folder)


def _text(name: str) -> Callable[[Path], object]:
    return lambda work: TextReader(str).read(str(work / TEXTS / name), rows=9)


def _tokenizer(work: Path) -> None:
    source = TextSource(str(work / TEXTS / "a.txt"))
    read_windows([source], work / MODEL, tokens=32, window=16, seed=0, vocabulary=64)


def _generate(work: Path) -> None:
    generate(GenerateRequest(folder=work / OUT, prompt="3 4", tokens=1))


READERS = {
    "safetensors": Reader("model/model-*.safetensors", _tensors),
    "index": Reader("model/model.safetensors.index.json", _open),
    "config": Reader("model/config.json", _open),
    "config-streamed": Reader("model/config.json", _stream),
    "tucker-config": Reader("out/config.json", _tucker),
    "tucker-config-generate": Reader("out/config.json", _generate),
    "manifest": Reader("out/tuckerize.json", _tucker),
    "manifest-check": Reader("out/tuckerize.json", _shards),
    "shard-manifest": Reader("out/tp2/tuckerize.json", _shards),
    "recipe": Reader("recipe.yaml", _recipe),
    "card": Reader("model/README.md", _card),
    "verify": Reader("out/verify.json", _tucker),
    "reconstruction": Reader("dense/tuckerize-reconstruct.json", lambda work: check(work / DENSE)),
    "profile": Reader("cache/layer-*.safetensors", _cache),
    "states": Reader("cache/hidden.safetensors", _cache),
    "plan": Reader("unfinished/.tuckerize/plan.json", _continue),
    "record": Reader("unfinished/.tuckerize/piece.json", _continue),
    "tokenizer": Reader("model/tokenizer.json", _tokenizer),
    "tokenizer-config": Reader("model/tokenizer_config.json", _tokenizer),
    **{
        f"text-{kind}": Reader(f"texts/a.{kind}", _text(f"a.{kind}"))
        for kind in ("txt", "jsonl", "json", "gz", "parquet")
    },
}
"""Readers by name."""


def make_work(folder: Path) -> Path:
    """Make the folder that readers read: a model, its Tucker checkpoint with shards, texts."""
    model = add_tokenizer(make_tiny_model(folder / MODEL, shards=True))
    (model / "README.md").write_text("---\nlicense: mit\ntags: [moe, text]\n---\n# Card\n")
    decompose(DecomposeRequest(model=model, output=folder / OUT, rank="2,full,50%"))
    shard(ShardRequest(folder=folder / OUT, tp=2))
    (folder / OUT / "verify.json").write_text('{"passed": true}')
    reconstruct(ReconstructRequest(folder=folder / OUT, output=folder / DENSE))
    cache = ProfileCache(folder / CACHE, "key", str)
    numbers: dict[str, Any] = {"sensitivity": 2.0, "small_sensitivity": 1.0, "switching": 0.5}
    names = {field.name for field in fields(LayerProfile)} - {"layer", *numbers}
    cache.save(LayerProfile(layer=1, **numbers | dict.fromkeys(names, np.linspace(1, 0, 9))))
    cache.save_states(1, {"dense": torch.ones(4, 8)})
    unfinished = OutputFolder(folder / UNFINISHED)
    with unfinished.claim(PLAN, overwrite=False):
        piece = folder / UNFINISHED / "piece.safetensors"
        shutil.copyfile(min(model.glob("*.safetensors")), piece)
        unfinished.write_record("piece", {"residual": 0.5}, [describe_file(piece)])
    rules = {"rules": [{"layers": "1-", "keep": 0.7}], "group_size": 4, "joint": "gate_up"}
    (folder / "recipe.yaml").write_text(json.dumps(rules))
    texts = folder / TEXTS
    texts.mkdir()
    rows = [{"text": f"{n} {n}"} for n in range(4)]
    rows += [{"messages": [{"role": "user", "content": "3"}, {"role": "tool", "content": None}]}]  # type: ignore[dict-item]
    (texts / "a.txt").write_text(" ".join(str(n % 60) for n in range(200)))
    (texts / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (texts / "a.json").write_text(json.dumps(rows[:4]))
    (texts / "a.gz").write_bytes(gzip.compress(b"3 4 5 " * 9, mtime=0))
    table = io.BytesIO()
    parquet.write_table(pa.table({"text": [str(n) for n in range(20)]}), table)
    (texts / "a.parquet").write_bytes(table.getvalue())
    return folder


def read_changed(work: Path, reader: Reader, content: bytes) -> None:
    """Read a file in another content, and put its own content back."""
    path = reader.path(work)
    kept = path.with_name(f".{path.name}.kept")
    shutil.copyfile(path, kept)
    try:
        path.write_bytes(content)
        reader.read(work)
    finally:
        kept.replace(path)

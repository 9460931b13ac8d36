"""Checkpoints: what is written is read, planned bytes are written bytes, damage is an error."""

from __future__ import annotations

import copy
import json
import math
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tuckerize.checkpoint.output import MANIFEST, OutputFolder
from tuckerize.checkpoint.reader import TORCH_DTYPES, Checkpoint, WeightFile, read_tensors
from tuckerize.checkpoint.weight_set import INDEX, SINGLE_FILE
from tuckerize.checkpoint.writer import copy_tensors, write_index, write_tensors
from tuckerize.errors import CheckpointError
from tuckerize.format.manifest import read_shard_manifest, read_tucker_manifest
from tuckerize.moe.source import SourceModel
from tuckerize.parallel.processes import Processes
from tuckerize.pipeline.inspect import describe_plan
from tuckerize.pipeline.run_plan import compress_model as decompose
from tuckerize.planning.plan import make_plan, output_fingerprint
from tuckerize.progress import SilentProgress
from tuckerize.recipe_reader import parse_recipe

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["BF16", "F32", "../a", "model.safetensors", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    """Named tensors of random bits, not all of them numbers."""
    names = draw(st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    found = {}
    for name in names:
        if name == "__metadata__":
            continue
        dtype = TORCH_DTYPES[draw(st.sampled_from(sorted(TORCH_DTYPES)))]
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        count = torch.Size(shape).numel() * dtype.itemsize
        bits = torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)
        found[name] = bits.view(dtype).reshape(shape)
    return found


@contextmanager
def new_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def bits_of(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    flat = tensor.contiguous().flatten().view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), bytes(flat.tolist())


@given(tensors(), st.data())
def test_tensors_written_copied_and_read_are_the_same(
    written: dict[str, Tensor], data: st.DataObject
) -> None:
    expected = {name: bits_of(tensor) for name, tensor in written.items()}
    kept = data.draw(st.sets(st.sampled_from(sorted(written)))) if written else set()
    with new_folder() as folder:
        path, copied = folder / "a.safetensors", folder / "b.safetensors"
        record = write_tensors(path, written)
        assert record.bytes == path.stat().st_size
        copy_tensors(copied, WeightFile.open(path), kept)
        for place, names in ((path, set(written)), (copied, kept)):
            opened = WeightFile.open(place)
            assert set(opened.tensors) == names
            read = dict(read_tensors(place, names))
            assert {name: bits_of(read[name]) for name in names} == {
                name: expected[name] for name in names
            }
            for name in names:
                header = opened.tensors[name].header
                assert (TORCH_DTYPES[header.dtype], header.shape) == expected[name][:2]
                assert header.bytes == len(expected[name][2])


def places(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values inside a value."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


def mutated(draw: st.DrawFn, value: Any) -> Any:  # noqa: ANN401
    """JSON values with one place replaced or removed."""
    value = copy.deepcopy(value)
    place = draw(st.sampled_from(places(value)))
    if not place:
        return draw(json_values)
    parent = value
    for key in place[:-1]:
        parent = parent[key]
    if draw(st.booleans()):
        parent[place[-1]] = draw(json_values | st.sampled_from([0, 1, -1, 4, 8, 2**63]))
    else:
        del parent[place[-1]]
    return value


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8, 16]},
}


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    text = json.dumps(mutated(draw, HEADER)).encode()
    length = draw(st.just(len(text)) | st.integers(0, 2**64 - 1))
    return struct.pack("<Q", length) + text + bytes(draw(st.sampled_from([16, 0, 8, 15])))


def refusal_of(work: Callable[[], object]) -> CheckpointError | None:
    """The error that work ends with, if it is the one that is allowed."""
    try:
        work()
    except CheckpointError as error:
        return error
    return None


def use_everything(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.bytes >= 0
    assert checkpoint.parameters >= 0
    list(checkpoint.read(checkpoint.tensors))


@given(headers() | st.binary(max_size=64))
def test_damaged_weight_file_is_read_or_refused_with_a_checkpoint_error(content: bytes) -> None:
    with new_folder() as folder:
        (folder / "config.json").write_text("{}")
        (folder / SINGLE_FILE).write_bytes(content)
        refusal = refusal_of(lambda: use_everything(folder))
        assert refusal is None or str(folder) in refusal.message


@given(st.data())
def test_damaged_index_is_read_or_refused_with_a_checkpoint_error(data: st.DataObject) -> None:
    with new_folder() as folder:
        (folder / "config.json").write_text("{}")
        for name in ("a", "b"):
            write_tensors(folder / f"{name}.safetensors", {name: torch.zeros(3)})
        write_index(folder, [WeightFile.open(folder / f"{n}.safetensors") for n in ("a", "b")])
        intact = json.loads((folder / INDEX).read_text())
        (folder / INDEX).write_text(json.dumps(data.draw(st.composite(mutated)(intact))))
        refusal = refusal_of(lambda: use_everything(folder))
        assert refusal is None or str(folder) in refusal.message


TUCKER_MANIFEST = {
    "schema_version": 1,
    "tuckerize_version": "0.1.0",
    "family": "deepseek_v2",
    "source": {
        "model": "m",
        "config_sha256": "0" * 64,
        "files": [{"name": "a.safetensors", "bytes": 1, "sha256": "0" * 64}],
    },
    "recipe": {"rules": [{"keep": 0.5}]},
    "dtype": "BF16",
    "shape": [8, 24, 32],
    "group_size": 4,
    "joint": None,
    "stacks": [
        {
            "layer": 1,
            "group": 0,
            "projection": "up_proj",
            "multilinear_rank": [4, 24, 8],
            "relative_residual": 0.5,
            "sweeps": 1,
        }
    ],
    "before": dict.fromkeys(
        ("routed_parameters", "routed_bytes", "total_parameters", "total_bytes"), 1
    ),
    "after": dict.fromkeys(
        ("routed_parameters", "routed_bytes", "total_parameters", "total_bytes"), 1
    ),
    "files": [{"name": "a.safetensors", "bytes": 1, "sha256": "0" * 64}],
}
SHARD_MANIFEST = {
    "schema_version": 1,
    "tuckerize_version": "0.1.0",
    "layout": "rank",
    "tp_size": 2,
    "tucker_manifest_sha256": "0" * 64,
    "uneven": ["x"],
    "shards": [
        {
            "layer": 1,
            "group": 0,
            "tp_rank": 1,
            "file": {"name": "a.safetensors", "bytes": 1, "sha256": "0" * 64},
        }
    ],
}


@given(st.composite(mutated)(TUCKER_MANIFEST))
@example(TUCKER_MANIFEST)
def test_damaged_tucker_manifest_is_read_or_refused_with_a_checkpoint_error(value: object) -> None:
    with new_folder() as folder:
        (folder / MANIFEST).write_text(json.dumps(value))
        refusal = refusal_of(lambda: read_tucker_manifest(folder))
        if refusal:
            assert value != TUCKER_MANIFEST
            assert str(folder) in refusal.message
        else:
            manifest = read_tucker_manifest(folder)
            assert manifest.groups > max(stack.group for stack in manifest.stacks) >= 0
            assert [file.name for file in manifest.files if "/" in file.name] == []


@given(st.composite(mutated)(SHARD_MANIFEST))
@example(SHARD_MANIFEST)
def test_damaged_shard_manifest_is_read_or_refused_with_a_checkpoint_error(value: object) -> None:
    with new_folder() as folder:
        (folder / MANIFEST).write_text(json.dumps(value))
        refusal = refusal_of(lambda: read_shard_manifest(folder))
        if refusal:
            assert value != SHARD_MANIFEST
            assert str(folder) in refusal.message
        else:
            manifest = read_shard_manifest(folder)
            places = {(s.tp_rank, s.ep_rank) for s in manifest.shards}
            owned = [s for tp, ep in places for s in manifest.owned_by(tp_rank=tp, ep_rank=ep)]
            assert len(owned) == len(manifest.shards)
            assert [shard for shard in owned if "/" in shard.file.name] == []


@settings(max_examples=10, suppress_health_check=list(HealthCheck))
@given(
    rank=st.tuples(
        st.sampled_from([1, 2, 4]), st.sampled_from([1, 7, 24]), st.sampled_from([1, 9, 32])
    ).filter(lambda sizes: max(sizes) ** 2 <= math.prod(sizes)),  # others have no full core
    how=st.fixed_dictionaries(
        {
            "group_size": st.sampled_from([4, 8]),
            "joint": st.sampled_from([None, "gate_up"]),
            "dtype": st.sampled_from([None, "float32"]),
        }
    ),
    layers=st.sampled_from([None, "2"]),
)
def test_planned_bytes_are_the_written_bytes(
    tiny_model: Path, rank: tuple[int, int, int], how: dict[str, object], layers: str | None
) -> None:
    rule = {"rank": ",".join(map(str, rank)), "layers": layers}
    recipe = parse_recipe({"rules": [rule], "max_sweeps": 0, **how}, place="test")
    source = SourceModel.open(tiny_model)
    plan = make_plan(source, recipe)
    planned = describe_plan(plan, peak=0).after
    contents = output_fingerprint(source, recipe)
    with new_folder() as folder, OutputFolder(folder).claim(contents, overwrite=False):
        report = decompose(
            plan,
            folder,
            model=str(tiny_model),
            device=torch.device("cpu"),
            processes=Processes(),
            progress=SilentProgress(),
        )
        assert report is not None
        written = Checkpoint.open(folder)
        assert report.after == planned
        assert planned.total_bytes == written.bytes
        assert planned.total_parameters == written.parameters
        assert sum(stack.relative_residual for stack in report.stacks) == pytest.approx(
            sum(s.relative_residual for s in read_tucker_manifest(folder).stacks)
        )

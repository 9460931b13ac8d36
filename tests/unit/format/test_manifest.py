from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuckerize.checkpoint.files import FileRecord, write_json
from tuckerize.checkpoint.output import MANIFEST
from tuckerize.domain import MultilinearRank, Projection, Size, StackResult, StackShape
from tuckerize.errors import CheckpointError
from tuckerize.format.manifest import (
    ShardManifest,
    ShardRecord,
    TuckerManifest,
    read_shard_manifest,
    read_tucker_manifest,
)
from tuckerize.format.records import LayerRecord, Mask, SourceRecord, pack_neurons, unpack_neurons

FILE = FileRecord(name="a.safetensors", bytes=8, sha256="0" * 64)
TUCKER = TuckerManifest(
    tuckerize_version="0.1.0",
    family="deepseek_v2",
    source=SourceRecord(model="m", config_sha256="f" * 64, files=(FILE,)),
    recipe={"rules": [{"keep": 0.5}]},
    dtype="BF16",
    shape=StackShape(8, 3, 4),
    group_size=4,
    joint=None,
    stacks=tuple(
        StackResult(layer, group, Projection.UP, MultilinearRank(4, 3, 2), 0.25, 0)
        for layer in (3, 1)
        for group in (0, 1)
    ),
    before=Size(1, 2, 3, 4),
    after=Size(1, 2, 3, 4),
    files=(FILE,),
)
SHARDS = ShardManifest(
    tuckerize_version="0.1.0",
    layout="rank",
    tp_size=2,
    tucker_manifest_sha256="a" * 64,
    uneven=("x",),
    shards=tuple(ShardRecord(layer=1, group=0, tp_rank=rank, file=FILE) for rank in (0, 1)),
)


def change(value: Any, place: str, new: object) -> Any:  # noqa: ANN401
    """JSON values with one place changed; `files.0.name` is a place."""
    key, _, rest = place.partition(".")
    step: Any = int(key) if isinstance(value, list) else key
    value[step] = change(value[step], rest, new) if rest else new
    return value


def refusal(folder: Path, manifest: TuckerManifest | ShardManifest, place: str, new: object) -> str:
    write_json(folder / MANIFEST, change(manifest.model_dump(mode="json"), place, new))
    read = read_tucker_manifest if isinstance(manifest, TuckerManifest) else read_shard_manifest
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    return caught.value.message.removeprefix(f"{folder}/{MANIFEST} ")


def test_tucker_manifest_written_then_read_is_the_same(tmp_path: Path) -> None:
    write_json(tmp_path / MANIFEST, TUCKER.model_dump(mode="json"))
    manifest = read_tucker_manifest(tmp_path)
    assert manifest == TUCKER
    assert manifest.layers == (1, 3)
    assert (manifest.groups, manifest.stack_shape(1)) == (2, StackShape(4, 3, 4))
    assert isinstance(manifest.stacks[0].projection, Projection)


def test_shard_manifest_written_then_read_is_the_same(tmp_path: Path) -> None:
    write_json(tmp_path / MANIFEST, SHARDS.model_dump(mode="json"))
    manifest = read_shard_manifest(tmp_path)
    assert manifest == SHARDS
    assert manifest.owned_by(tp_rank=1, ep_rank=0) == [SHARDS.shards[1]]
    assert manifest.owned_by(tp_rank=1, ep_rank=1) == []


def test_shard_manifest_without_expert_parallelism_is_of_one_process(tmp_path: Path) -> None:
    value = SHARDS.model_dump(mode="json")
    del value["ep_size"]
    for shard in value["shards"]:
        del shard["ep_rank"]
    write_json(tmp_path / MANIFEST, value)
    assert read_shard_manifest(tmp_path) == SHARDS


@pytest.mark.parametrize("version", [0, 2, "1", None, 1.5])
def test_manifest_of_another_version_is_refused(tmp_path: Path, version: object) -> None:
    message = f"has schema_version {version!r}, this program reads 1"
    assert refusal(tmp_path, TUCKER, "schema_version", version) == message
    assert refusal(tmp_path, SHARDS, "schema_version", version) == message


def test_manifest_without_a_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match="schema_version None"):
        read_tucker_manifest(tmp_path)


@pytest.mark.parametrize("name", ["../a", "/a", "a/b", "..", "", ".a", "a\\b"])
def test_manifest_that_names_a_file_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    message = f"names the file {name!r}, expected a plain name in the same folder"
    assert refusal(tmp_path, TUCKER, "files.0.name", name) == message
    assert refusal(tmp_path, SHARDS, "shards.1.file.name", name) == message


@pytest.mark.parametrize(
    ("place", "new", "message"),
    [
        ("extra", 1, "extra: Extra inputs are not permitted"),
        ("files.0.extra", 1, "files.0.extra: Extra inputs are not permitted"),
        ("files.0.bytes", -1, "files.0.bytes: Input should be greater than or equal to 0"),
        ("files.0.sha256", "0" * 63, "files.0.sha256: String should match pattern"),
        ("group_size", 0, "group_size: Input should be greater than or equal to 1"),
        ("shape", [8, 3], "shape."),  # pydantic 2.10 names the field, later releases its place
        ("joint", "down", "joint: Input should be 'gate_up'"),
        ("stacks.1.projection", "gate", "stacks.1.projection: Input should be 'gate_proj'"),
        ("stacks", [], "stacks: Tuple should have at least 1 item"),
        ("stacks.1.group", 2, "Value error, a stack is of a group that is not one of 2"),
        ("stacks.1.group", -1, "Value error, a stack is of a group that is not one of 2"),
        ("shape", [-8, 3, 4], "Value error, groups of 4 do not fit the shape"),
        ("shape", [8, 0, 4], "Value error, groups of 4 do not fit the shape"),
        ("group_size", 3, "Value error, groups of 3 do not fit the shape"),
        ("group_size", 16, "Value error, groups of 16 do not fit the shape"),
        ("source", 7, "source: Input should be"),
    ],
)
def test_tucker_manifest_that_breaks_the_schema_names_the_place(
    tmp_path: Path, place: str, new: object, message: str
) -> None:
    found = refusal(tmp_path, TUCKER, place, new)
    assert found.startswith(f"is not a valid manifest: {message}")


@pytest.mark.parametrize(
    ("place", "new"),
    [("layout", "expert"), ("tp_size", 0), ("shards.0.tp_rank", -1), ("extra", 1)],
)
def test_shard_manifest_that_breaks_the_schema_names_the_place(
    tmp_path: Path, place: str, new: object
) -> None:
    found = refusal(tmp_path, SHARDS, place, new)
    assert found.startswith(f"is not a valid manifest: {place}: ")


def test_manifest_that_is_missing_says_that_the_folder_is_unfinished(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_tucker_manifest(tmp_path)
    assert caught.value.message == (
        f"{tmp_path} has no {MANIFEST}: it is not a finished Tucker checkpoint"
    )
    with pytest.raises(CheckpointError, match="does not exist"):
        read_shard_manifest(tmp_path)


def test_folder_of_shards_is_not_taken_for_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({"schema_version": 1, "shards": []}))
    with pytest.raises(CheckpointError, match="holds shards, and this needs"):
        read_tucker_manifest(tmp_path)


def test_manifest_on_disk_is_plain_json(tmp_path: Path) -> None:
    write_json(tmp_path / MANIFEST, TUCKER.model_dump(mode="json"))
    value = json.loads((tmp_path / MANIFEST).read_text())
    assert value["stacks"][0] == {
        "layer": 3,
        "group": 0,
        "projection": "up_proj",
        "multilinear_rank": [4, 3, 2],
        "relative_residual": 0.25,
        "sweeps": 0,
    }


@st.composite
def selections(draw: st.DrawFn) -> tuple[Mask, StackShape]:
    """Which neurons every expert of a group keeps."""
    experts, neurons = draw(st.integers(1, 9)), draw(st.integers(1, 40))
    rows = st.lists(st.booleans(), min_size=neurons, max_size=neurons)
    kept_EH = np.array([draw(rows) for _ in range(experts)], dtype=bool)
    return kept_EH, StackShape(experts, neurons, 4)


@given(selections())
def test_kept_neurons_packed_then_unpacked_are_the_same(
    selection: tuple[Mask, StackShape],
) -> None:
    kept_EH, shape = selection
    np.testing.assert_array_equal(unpack_neurons(pack_neurons(kept_EH), shape), kept_EH)


def test_kept_neurons_are_bits_of_expert_after_expert_in_base64() -> None:
    """The first in the highest bit of the first byte."""
    assert pack_neurons(np.array([[1, 0, 1], [0, 1, 1]], bool)) == "rA=="  # 101 011 00


def test_manifest_of_a_calibrated_layer_knows_its_stacks(tmp_path: Path) -> None:
    kept = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 1], [1, 0, 1]], dtype=bool)
    record = LayerRecord(
        layer=3,
        neurons=2,
        kept=(pack_neurons(kept), pack_neurons(kept[::-1])),
        output_error=0.1,
        predicted_error=None,
        refined=True,
    )
    full = LayerRecord(layer=1, neurons=3, output_error=None, predicted_error=0.0, refined=False)
    write_json(
        tmp_path / MANIFEST,
        TUCKER.model_copy(update={"calibrated": (full, record)}).model_dump(mode="json"),
    )
    manifest = read_tucker_manifest(tmp_path)
    assert manifest.calibrated == (full, record)
    assert manifest.stack_shape(3) == StackShape(4, 2, 4)
    assert manifest.stack_shape(1) == StackShape(4, 3, 4)
    assert manifest.kept_neurons(1, 0) is None
    assert manifest.widths(1, 0) == (3, 3, 3, 3)
    assert manifest.widths(3, 0) == (2, 1, 3, 2)
    assert manifest.widths(3, 1) == (2, 3, 1, 2)
    for group, expected in enumerate((kept, kept[::-1])):
        found = manifest.kept_neurons(3, group)
        assert found is not None
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("place", "new", "message"),
    [
        ("calibrated.0.kept", ["r1A="], "layer 3"),
        ("calibrated.0.kept", [], "layer 3"),
        ("calibrated.0.kept.0", "rA", "padding"),
        ("calibrated.0.kept.0", "/////w==", "32 bits are not 4 x 3"),
        ("calibrated.0.kept.0", "8AA=", "layer 3 does not keep 2 neurons an expert"),
        ("calibrated.0.kept.0", "/wA=", "layer 3"),  # the last expert keeps none
        ("calibrated.0.neurons", 3, "layer 3"),
        ("calibrated.0.neurons", 4, "layer 3"),
    ],
)
def test_kept_neurons_that_do_not_fit_are_refused(
    place: str, new: object, message: str, tmp_path: Path
) -> None:
    text = pack_neurons(np.array([[1, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 1]], dtype=bool))
    record = LayerRecord(
        layer=3,
        neurons=2,
        kept=(text, text),
        output_error=None,
        predicted_error=None,
        refined=False,
    )
    manifest = TUCKER.model_copy(update={"calibrated": (record,)})
    assert message in refusal(tmp_path, manifest, place, new)

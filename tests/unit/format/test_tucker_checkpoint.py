from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tuckerize.checkpoint.files import sha256_of
from tuckerize.checkpoint.output import MANIFEST
from tuckerize.domain import GATE_UP, Mode, Projection
from tuckerize.errors import CheckpointError
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint, factors_of
from tuckerize.names import TensorKind, TensorName

GOLDEN = Path(__file__).parents[2] / "golden" / "v0.1"


@pytest.mark.parametrize("name", ["tucker", "data-free", "calibrated"])
def test_groups_hold_all_factored_tensors_by_their_names(name: str) -> None:
    tucker = TuckerCheckpoint.open(GOLDEN / name)
    assert tucker.manifest_sha256 == sha256_of(GOLDEN / name / MANIFEST)
    found = {}
    for layer in tucker.manifest.layers:
        for group in range(tucker.manifest.groups):
            headers, tensors = tucker.group_headers(layer, group), tucker.read_group(layer, group)
            assert headers.keys() == tensors.keys()
            assert {n: h.shape for n, h in headers.items()} == {
                n: t.shape for n, t in tensors.items()
            }
            prefix = f"model.layers.{layer}.mlp.experts.group_{group}."
            assert tucker.group_module(layer, group) + "." == prefix
            found.update({f"{prefix}{name}": header for name, header in headers.items()})
    everything = tucker.checkpoint.tensors
    assert found == {name: header for name, header in everything.items() if ".group_" in name}
    assert tucker.group_headers(0, 0) == tucker.read_group(0, 0) == {}


def test_factors_of_uneven_experts_have_zeros_below_their_rows() -> None:
    tucker = TuckerCheckpoint.open(GOLDEN / "calibrated")
    group, widths = tucker.read_group(1, 0), tucker.manifest.widths(1, 0)
    assert len(set(widths)) > 1
    for projection in Projection:
        core = factors_of(group, projection).core
        assert core.shape[:2] == (len(widths), max(widths))
        for expert, width in enumerate(widths):
            assert torch.equal(core[expert, :width], group[TensorName.core(projection, expert)])
            assert not core[expert, width:].any()


def test_factors_of_gate_and_up_take_the_shared_one() -> None:
    tucker = TuckerCheckpoint.open(GOLDEN / "data-free")
    group = tucker.read_group(1, 0)
    shared = group[TensorName("gate_up_proj", TensorKind.U_I)]
    assert all(factors_of(group, projection).U_I is shared for projection in GATE_UP)
    down = factors_of(group, Projection.DOWN)
    assert down.U_I is group.get(TensorName.factor(Mode.HIDDEN, Projection.DOWN))
    assert down.U_I is not shared


def test_weight_file_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "tucker", tmp_path / "tucker"))
    manifest = folder / MANIFEST
    [size, *_] = [file.bytes for file in TuckerCheckpoint.open(folder).manifest.files]
    manifest.write_text(manifest.read_text().replace(f'"bytes": {size},', f'"bytes": {size + 1},'))
    with pytest.raises(CheckpointError, match=f"has {size} bytes, the manifest says {size + 1}"):
        TuckerCheckpoint.open(folder)


def test_family_that_is_not_known_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "tucker", tmp_path / "tucker"))
    manifest = folder / MANIFEST
    manifest.write_text(manifest.read_text().replace('"deepseek_v2"', '"deepseek_v9"'))
    with pytest.raises(CheckpointError, match="is of the family 'deepseek_v9', which is unknown"):
        TuckerCheckpoint.open(folder)

"""A weight file holds what the factors are, and its record what they lose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.expert_cases import SWIGLU, make_group, make_tokens
from tuckerize.checkpoint.files import sha256_of
from tuckerize.checkpoint.reader import WeightFile, read_tensors
from tuckerize.compression.closed_form import closed_form
from tuckerize.compression.factors import GroupFactors, LayerFactors, compress, for_each_group
from tuckerize.compression.target import CompressionTarget, LayerPiece
from tuckerize.compression.write import write_piece
from tuckerize.domain import DOWN, GATE_UP, MultilinearRank, Projection, StackShape
from tuckerize.recipe import CalibrationSettings

SHAPE = StackShape(3, 10, 8)
EXPERTS = "model.layers.4.mlp.experts"


def compressed(neurons: int, hidden: int) -> tuple[LayerPiece, LayerFactors]:
    """A calibrated layer of two groups."""
    rank = MultilinearRank(SHAPE.experts, neurons, hidden)
    target = CompressionTarget(neurons, {GATE_UP: rank, DOWN: rank})
    tokens = make_tokens(80, 8, 6)
    groups = (
        GroupFactors.of(index, make_group(SHAPE, first=3 * index, seed=index), target)
        for index in range(2)
    )
    step = for_each_group(closed_form(tokens, activation=SWIGLU, max_sweeps=2))
    piece = LayerPiece(4, (target,) * 2, CalibrationSettings(texts=("text",)), 0.25)
    return piece, compress(LayerFactors(4, tuple(groups), 0.5), [step])


@pytest.mark.parametrize("sizes", [(10, 5), (6, 5), (6, 8)])
def test_file_and_record_are_those_of_the_factors(sizes: tuple[int, int], tmp_path: Path) -> None:
    piece, layer = compressed(*sizes)
    path = tmp_path / "model.safetensors"
    record = write_piece(path, piece, [layer], EXPERTS)
    assert record["file"]["sha256"] == sha256_of(path)
    written = dict(read_tensors(path, WeightFile.open(path).tensors))
    expected = {
        f"{EXPERTS}.group_{group.index}.{name}": tensor
        for group in layer.groups
        for name, tensor in group.tensors().items()
    }
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    calibrated = record["calibrated"]
    assert (calibrated["layer"], calibrated["neurons"]) == (4, sizes[0])
    assert (calibrated["output_error"], calibrated["predicted_error"]) == (0.5, 0.25)
    assert len(calibrated["kept"]) == (2 if sizes[0] < SHAPE.intermediate else 0)


def test_residuals_count_neurons_that_are_not_kept_as_lost(tmp_path: Path) -> None:
    piece, layer = compressed(6, 5)
    record = write_piece(tmp_path / "model.safetensors", piece, [layer], EXPERTS)
    places = [(s["group"], s["projection"]) for s in record["stacks"]]
    assert places == [(group, projection) for group in range(2) for projection in Projection]
    for stack in record["stacks"]:
        group = layer.groups[stack["group"]]
        projection = Projection(stack["projection"])
        assert group.kept is not None
        dense_EHI = group.dense.stacks[projection].double().numpy()
        found_EHI = np.zeros_like(dense_EHI)
        for expert in range(SHAPE.experts):
            rows_K = group.kept.of_expert(expert).numpy()
            slice_KI = group.factors[projection].expand_slice(expert, torch.float64).numpy()
            found_EHI[expert, rows_K] = slice_KI[: len(rows_K)]
        expected = np.linalg.norm(dense_EHI - found_EHI) / np.linalg.norm(dense_EHI)
        assert stack["relative_residual"] == pytest.approx(expected, rel=1e-5)
        assert tuple(stack["multilinear_rank"]) == (3, 6, 5)


def test_parts_one_by_one_give_the_same_file_as_all_at_once(tmp_path: Path) -> None:
    piece, layer = compressed(10, 5)
    one_by_one = (LayerFactors(4, (group,)) for group in layer.groups)
    records = [
        write_piece(tmp_path / name, LayerPiece(4, piece.targets), parts, EXPERTS)
        for name, parts in (("a", [layer]), ("b", one_by_one))
    ]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert records[0]["stacks"] == records[1]["stacks"]
    assert records[0].keys() == {"file", "stacks"}

"""The whole job on quantized sources: what is compressed, what keeps its format, what loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.quantized_models import FORMATS, quantize_model
from tests.tiny_models import add_tokenizer, make_tiny_model
from tuckerize import (
    DecomposeRequest,
    ReconstructRequest,
    decompose,
    inspect,
    preview,
    reconstruct,
)
from tuckerize.checkpoint.files import read_json_object
from tuckerize.domain import Projection
from tuckerize.moe.source import SourceModel

FULL = "full,full,full"


# compressed-tensors computes them in bfloat16, whatever the model's type.
IN_BFLOAT16 = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    """Models of 8 experts of 32 x 64 in float32 and in bfloat16, with a tokenizer."""
    folder = tmp_path_factory.mktemp("plain")
    return {
        dtype: add_tokenizer(
            make_tiny_model(folder / str(dtype), hidden=64, intermediate=32, dtype=dtype)
        )
        for dtype in (torch.float32, torch.bfloat16)
    }


def logits_of(folder: Path) -> Tensor:
    """Logits of a fixed prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.no_grad():
        output: Tensor = model(torch.arange(48).unsqueeze(0)).logits
    return output.float()


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors in the weight files."""
    paths = sorted(folder.glob("*.safetensors"))
    return {name: tensor for path in paths for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("kind", FORMATS)
def test_stack_is_the_dense_value_of_every_expert(
    plain: dict[torch.dtype, Path], tmp_path: Path, kind: str
) -> None:
    model = plain[torch.bfloat16]
    dense = quantize_model(model, tmp_path / "q", kind)
    source = SourceModel.open(tmp_path / "q")
    for projection in Projection:
        stack = source.stack(2, projection, range(3, 6))
        names = [f"model.layers.2.mlp.experts.{e}.{projection}.weight" for e in range(3, 6)]
        oracle = torch.stack([dense[name] for name in names])
        oracle = oracle.mT if projection == Projection.DOWN else oracle
        torch.testing.assert_close(stack.double(), oracle, rtol=2**-7, atol=0)
    stored = stored_tensors(tmp_path / "q")
    routed = [t for name, t in stored.items() if ".experts." in name]
    assert source.size.routed_bytes == sum(tensor.nbytes for tensor in routed)
    assert source.size.routed_parameters == SourceModel.open(model).size.routed_parameters
    assert source.size.total_bytes == sum(tensor.nbytes for tensor in stored.values())
    report = inspect(tmp_path / "q")
    assert report.coding is not None
    assert report.size == source.size
    assert not report.notes


@pytest.mark.parametrize("kind", FORMATS)
def test_rest_keeps_its_format_and_loads(
    plain: dict[torch.dtype, Path], tmp_path: Path, kind: str
) -> None:
    quantized, out = tmp_path / "q", tmp_path / "out"
    dtype = torch.bfloat16 if kind in IN_BFLOAT16 else torch.float32
    quantize_model(plain[dtype], quantized, kind)
    report = decompose(DecomposeRequest(model=quantized, output=out, rank=FULL))
    assert report is not None
    assert not report.notes
    source = read_json_object(quantized / "config.json")["quantization_config"]
    rest = read_json_object(out / "config.json")["quantization_config"]["rest"]
    key = "ignore" if "ignore" in source else "modules_to_not_convert"
    assert {**rest, key: []} == {**source, key: []}
    assert set(rest[key]) > set(source[key])
    before, after = stored_tensors(quantized), stored_tensors(out)
    left = {name for name in before if ".experts." not in name}
    assert {name for name in after if ".experts." not in name} == left
    assert any("scale" in name for name in left)
    for name in left:
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
    assert report.after.total_bytes == sum(tensor.nbytes for tensor in after.values())
    assert inspect(out).size == report.after
    # The oracle: the stock model of all weights, dequantized by this package.
    reconstruct(ReconstructRequest(folder=out, output=tmp_path / "dense"))
    assert "quantization_config" not in read_json_object(tmp_path / "dense" / "config.json")
    expected, logits = logits_of(tmp_path / "dense"), logits_of(out)
    bound = 0.05 if kind in IN_BFLOAT16 else 1e-5
    assert float((logits - expected).norm()) < bound * float(expected.norm())


@pytest.mark.parametrize("kind", ["fp8", "pack-quantized"])
def test_saved_again_it_is_dense_besides_the_factors(
    plain: dict[torch.dtype, Path], tmp_path: Path, kind: str
) -> None:
    quantize_model(plain[torch.float32], tmp_path / "q", kind)
    out = tmp_path / "out"
    decompose(DecomposeRequest(model=tmp_path / "q", output=out, rank=FULL, layers="1"))
    AutoModelForCausalLM.from_pretrained(out).save_pretrained(tmp_path / "again")
    announced = read_json_object(tmp_path / "again" / "config.json")["quantization_config"]
    assert "rest" not in announced
    assert {t.dtype for t in stored_tensors(tmp_path / "again").values()} == {torch.float32}
    assert torch.equal(logits_of(tmp_path / "again"), logits_of(out))


def test_rest_can_be_dequantized(plain: dict[torch.dtype, Path], tmp_path: Path) -> None:
    dense = quantize_model(plain[torch.bfloat16], tmp_path / "q", "fp8")
    request = DecomposeRequest(
        model=tmp_path / "q",
        output=tmp_path / "out",
        rank="full,full,50%",
        dequantize_rest=True,
        dtype="float32",
    )
    planned, report = preview(request), decompose(request)
    assert planned is not None
    assert report is not None
    assert planned.after == report.after == inspect(tmp_path / "out").size
    config = read_json_object(tmp_path / "out" / "config.json")
    assert "rest" not in config["quantization_config"]
    after = stored_tensors(tmp_path / "out")
    assert not any("scale" in name for name in after)
    left = [name for name in dense if ".experts." not in name]
    assert left
    for name in left:
        assert after[name].dtype == torch.float32
        # Through the model's bfloat16, in which the source is read.
        torch.testing.assert_close(after[name].double(), dense[name], rtol=2**-8, atol=0)
    assert logits_of(tmp_path / "out").isfinite().all()


def test_experts_alone_quantized_leave_a_plain_rest(
    plain: dict[torch.dtype, Path], tmp_path: Path
) -> None:
    model = plain[torch.bfloat16]
    quantize_model(model, tmp_path / "q", "pack-quantized", experts_only=True)
    out = tmp_path / "out"
    report = decompose(DecomposeRequest(model=tmp_path / "q", output=out, rank="full,full,50%"))
    assert report is not None
    assert "rest" not in read_json_object(out / "config.json")["quantization_config"]
    headers = SourceModel.open(tmp_path / "q").checkpoint.tensors
    routed = sum(header.bytes for name, header in headers.items() if ".experts." in name)
    assert report.before.routed_bytes == routed < SourceModel.open(model).size.routed_bytes / 3

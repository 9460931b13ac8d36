"""The whole job on quantized sources: what is compressed, what keeps its format, what loads."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations import compressed_tensors

from tests.quantized_models import FORMATS, OTHERS, quantize_deepseek_v4, quantize_model
from tests.running import run_here
from tests.tiny_families import make_family
from tests.tiny_models import add_tokenizer, make_tiny_model, write_text
from tuckerize import (
    DecomposeRequest,
    EvaluateRequest,
    GenerateRequest,
    ReconstructRequest,
    ShardRequest,
    VerifyRequest,
    decompose,
    evaluate,
    generate,
    inspect,
    preview,
    reconstruct,
    shard,
    verify,
)
from tuckerize.calibration.text import parse_source, read_windows
from tuckerize.checkpoint.files import read_json_object, write_json
from tuckerize.domain import Projection
from tuckerize.errors import CheckpointError
from tuckerize.moe.source import SourceModel
from tuckerize.progress import SilentProgress

FULL = "full,full,full"
ANNOUNCED = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


# Later releases of transformers dequantize these when they load them, and leave activations alone.
ROUNDS_ACTIVATIONS = not hasattr(compressed_tensors, "CompressedTensorsDequantize")
WITH_ACTIVATIONS = ("float-quantized", "int-quantized")
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
    bound = 0.15 if kind in WITH_ACTIVATIONS and ROUNDS_ACTIVATIONS else bound
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
    saved = stored_tensors(tmp_path / "again").values()
    assert {t.dtype for t in saved if t.numel() > 2} == {torch.float32}  # 5.14 keeps `weight_shape`
    assert torch.equal(logits_of(tmp_path / "again"), logits_of(out))


@pytest.mark.parametrize("cores", ["w8", "w4"])
@pytest.mark.parametrize("kind", ["fp8", "pack-quantized", "int-quantized"])
def test_quantised_cores_load_beside_a_quantized_rest(
    plain: dict[torch.dtype, Path], tmp_path: Path, kind: str, cores: str
) -> None:
    out = tmp_path / "out"
    quantize_model(plain[torch.float32], tmp_path / "q", kind)
    decompose(DecomposeRequest(model=tmp_path / "q", output=out, rank=FULL, quantize=cores))
    reconstruct(ReconstructRequest(folder=out, output=tmp_path / "dense", dequantize=True))
    expected, logits = logits_of(tmp_path / "dense"), logits_of(out)
    bound = 0.15 if kind in WITH_ACTIVATIONS and ROUNDS_ACTIVATIONS else 1e-5
    assert float((logits - expected).norm()) < bound * float(expected.norm())


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


def test_whole_job_on_an_fp8_source(plain: dict[torch.dtype, Path], tmp_path: Path) -> None:
    source, out, dense = (tmp_path / name for name in ("q", "out", "dense"))
    quantize_model(plain[torch.bfloat16], source, "fp8")
    text = write_text(tmp_path / "text.txt", 4000)
    settings = {"texts": [str(text)], "tokens": 2048, "window": 64, "refine": 5, "multiple": 8}
    report = decompose(DecomposeRequest(model=source, output=out, keep=0.75, calibration=settings))
    assert report is not None
    assert report.after.routed_parameters <= 0.75 * report.before.routed_parameters
    shard(ShardRequest(folder=out, tp=1))
    assert verify(VerifyRequest(folder=out)).passed
    reconstruct(ReconstructRequest(folder=out, output=dense))
    # The same model three times: streamed with FP8 attention, streamed dense, and in transformers.
    request = EvaluateRequest(model=out, against=dense, text=text, tokens=512, window=64)
    of_dense, of_out = (result.nats for result in evaluate(request).results)
    assert of_out == pytest.approx(of_dense, rel=1e-3)
    assert float((logits_of(out) - logits_of(dense)).norm() / logits_of(dense).norm()) < 0.05
    assert generate(GenerateRequest(folder=out, prompt="1 2 3", tokens=4)).split()


@pytest.mark.skipif(
    transformers.__version__.startswith("5.16."), reason="it cannot load FP8 with routed experts"
)
def test_stream_of_a_quantized_source_is_transformers_own_pass(
    plain: dict[torch.dtype, Path], tmp_path: Path
) -> None:
    source = tmp_path / "q"
    quantize_model(plain[torch.float32], source, "fp8")
    text = write_text(tmp_path / "text.txt", 400)
    [found] = evaluate(EvaluateRequest(model=source, text=text, tokens=256, window=64)).results
    windows = read_windows([parse_source(str(text))], source, tokens=256, window=64, seed=0)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss for row in windows.tokens_SL]
    assert found.nats == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert found.size == SourceModel.open(source).size


def test_stale_announcement_is_ignored_with_a_note(
    plain: dict[torch.dtype, Path], tmp_path: Path
) -> None:
    model, out = tmp_path / "m", tmp_path / "out"
    shutil.copytree(plain[torch.bfloat16], model)
    config = read_json_object(model / "config.json")
    write_json(model / "config.json", {**config, **ANNOUNCED})
    [note] = inspect(model).notes
    assert "quantization_config is ignored" in note
    assert f"note: {note}" in run_here("inspect", model).stderr
    report = decompose(DecomposeRequest(model=model, output=out, rank=FULL))
    assert report is not None
    assert report.notes == (note,)
    assert "rest" not in read_json_object(out / "config.json")["quantization_config"]
    assert torch.isfinite(logits_of(out)).all()


def test_experts_with_foreign_scales_are_named(
    plain: dict[torch.dtype, Path], tmp_path: Path
) -> None:
    source = tmp_path / "q"
    quantize_model(plain[torch.bfloat16], source, "fp8")
    tensors = stored_tensors(source)
    tensors["model.layers.2.mlp.experts.5.up_proj.weight_scale_inv"] *= 100
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    report = decompose(DecomposeRequest(model=source, output=tmp_path / "out", rank=FULL))
    assert report is not None
    [note] = report.notes
    assert note.startswith("layer 2, expert 5: the rms of up_proj is ")


def test_without_a_description_the_rest_must_be_dequantized(
    plain: dict[torch.dtype, Path], tmp_path: Path
) -> None:
    source = tmp_path / "q"
    quantize_model(plain[torch.bfloat16], source, "fp8")
    config = read_json_object(source / "config.json")
    del config["quantization_config"]
    write_json(source / "config.json", config)
    assert inspect(source).coding == "FP8"
    request = DecomposeRequest(model=source, output=tmp_path / "out", rank=FULL)
    with pytest.raises(CheckpointError, match="no quantization_config to say so") as caught:
        decompose(request)
    assert "--dequantize-rest" in caught.value.hint
    assert decompose(replace(request, dequantize_rest=True)) is not None


@pytest.mark.parametrize("kind", OTHERS)
def test_gptq_and_awq_load_where_the_rest_is_dequantized(
    plain: dict[torch.dtype, Path], tmp_path: Path, kind: str
) -> None:
    source, out = tmp_path / "q", tmp_path / "out"
    dense = quantize_model(plain[torch.float32], source, kind)
    decompose(DecomposeRequest(model=source, output=out, rank=FULL, dequantize_rest=True))
    oracle = shutil.copytree(plain[torch.float32], tmp_path / "oracle")
    tensors = stored_tensors(oracle) | {name: own.float() for name, own in dense.items()}
    save_file(tensors, oracle / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(logits_of(out), logits_of(oracle), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "experts", "rest"),
    [
        ("fp8", None, None),
        ("pack-quantized", None, None),
        ("mxfp4-pack-quantized", None, None),
        ("asymmetric", "cannot load packed integers", None),
        ("int-quantized", "cannot load INT8", None),
        ("nvfp4-pack-quantized", "loads wrong values for NVFP4", None),
        ("gptq", "loads random values for GPTQ", "gptqmodel and optimum installed"),
        ("awq", "loads random values for AWQ", "gptqmodel installed"),
    ],
)
def test_what_transformers_will_not_load_is_named_before_the_work(
    plain: dict[torch.dtype, Path],
    tmp_path: Path,
    kind: str,
    experts: str | None,
    rest: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantize_model(plain[torch.bfloat16], tmp_path / "q", kind)

    def notes(**options: Any) -> list[str]:  # noqa: ANN401
        found: list[str] = []
        monkeypatch.setattr(progress := SilentProgress(), "note", found.append)
        preview(DecomposeRequest(model=tmp_path / "q", rank="full,full,50%", **options), progress)
        return found

    assert not notes(dequantize_rest=True, layers="1")
    of_rest = notes()
    assert [rest in note for note in of_rest if rest] == [True] * bool(rest)
    assert len(of_rest) == bool(rest)
    first, *others = [*notes(layers="1"), ""]
    assert len(others) == bool(rest) + bool(experts)
    if experts:
        assert f"{experts} experts, which layer 2 keeps" in first
        assert "--dequantize-rest" in first
        assert all(rest in note for note in others[:-1] if rest)


@pytest.mark.parametrize("kind", ["int-quantized", "asymmetric", "nvfp4-pack-quantized"])
def test_experts_that_transformers_does_not_load_are_loaded_where_the_rest_is_dense(
    plain: dict[torch.dtype, Path], tmp_path: Path, kind: str
) -> None:
    """Once this fails for the source, the note on it can go."""
    quantize_model(plain[torch.bfloat16], tmp_path / "q", kind)
    request = DecomposeRequest(
        model=tmp_path / "q", output=tmp_path / "out", rank=FULL, layers="1", dequantize_rest=True
    )
    decompose(request)
    reconstruct(ReconstructRequest(folder=tmp_path / "out", output=tmp_path / "dense"))
    expected, logits = logits_of(tmp_path / "dense"), logits_of(tmp_path / "out")
    assert float((logits - expected).norm()) < 0.05 * float(expected.norm())
    try:
        wrong = logits_of(tmp_path / "q")
    except RuntimeError:
        return
    assert float((wrong - expected).norm()) > 0.5 * float(expected.norm())


@pytest.mark.skipif(
    transformers.__version__.startswith("5.14."), reason="it saves other names than the releases'"
)
def test_deepseek_v4_as_it_is_released(tmp_path: Path) -> None:
    """Experts in MXFP4 beside FP8, under the names of the releases: read, compressed, verified."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32}
    plain, out = make_family(tmp_path / "plain", "deepseek_v4", **sizes), tmp_path / "out"
    dense = quantize_deepseek_v4(plain, tmp_path / "q")
    source = SourceModel.open(tmp_path / "q")
    assert source.coding == "MXFP4"
    assert {str(own.coding) for own in source.checkpoint.quantized.values()} == {"MXFP4", "FP8"}
    assert source.moe.family.experts_prefix(0) == "layers.0.ffn.experts"
    for projection, own in zip(Projection, ("w1", "w3", "w2"), strict=True):
        experts = (f"model.layers.1.ffn.experts.{expert}.{own}.weight" for expert in range(8))
        stack = torch.stack([dense[name] for name in experts])
        stack = stack.mT if projection == Projection.DOWN else stack
        assert torch.equal(source.stack(1, projection), stack)
    request = DecomposeRequest(model=tmp_path / "q", output=out, rank=FULL, dequantize_rest=True)
    decompose(request)
    # The oracle: transformers' model of the dense values.
    save_file(dense, plain / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(logits_of(out), logits_of(plain), rtol=1e-4, atol=1e-5)
    small = tmp_path / "small"
    decompose(replace(request, output=small, rank=None, keep=0.75))
    shard(ShardRequest(folder=small, tp=1))
    assert verify(VerifyRequest(folder=small)).passed


def test_tucker_checkpoint_is_no_source(plain: dict[torch.dtype, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    decompose(DecomposeRequest(model=plain[torch.bfloat16], output=out, rank=FULL))
    with pytest.raises(CheckpointError, match="is a Tucker checkpoint"):
        decompose(DecomposeRequest(model=out, output=tmp_path / "again", rank=FULL))

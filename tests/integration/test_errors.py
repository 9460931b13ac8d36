"""What a hasty user types: a clear message, exit code 2, and nothing that existed is touched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from tests.running import files_of, succeed
from tests.running import run_here as run
from tests.tiny_models import add_tokenizer, make_tiny_family, write_text
from tuckerize import inspect

OK = ("--keep", "0.7")


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ((), "no size was given", "--tolerance 0.1"),
        (("--keep", "0.5", "--rank", "1,1,1"), "--rank and --keep exclude each other", "exactly"),
        (("--keep", "0"), "--keep 0 is not a number above 0 and at most 1", ""),
        (("--keep", "75"), "--keep 75 is not a number above 0", "did you mean 0.75 (75 %)?"),
        (("--keep", "half"), "--keep half is not a number above 0 and at most 1", ""),
        (("--keep", "1.5"), "--keep 1.5 is not a number above 0 and at most 1", ""),
        (("--keep", "nan"), "--keep nan is not a number", ""),
        (("--keep", "150%"), "--keep 150% is not a number above 0 and at most 1", ""),
        (("--keep", "0.001"), "keep 0.001 is below", "choose keep of at least 0.03"),
        (("--rank", "4,4"), "'4,4' has 2 sizes, expected three: r_E,r_H,r_I", ""),
        (("--rank", "full,full,150%"), "'150%' in 'full,full,150%' is not above 0 %", ""),
        (
            ("--rank", "a,b,c"),
            "'a' in 'a,b,c' is not a size of 1 or more, a percentage or 'full'",
            "",
        ),
        (
            ("--rank", "9,24,32"),
            "core size 9 of the expert mode (E) is not between 1 and 8",
            "full",
        ),
        (("--rank", "2,3,7"), "core size 7 of the hidden mode (I) is above 6", "at most 6"),
        (("--tolerance", "2"), "--tolerance 2.0 is not a number above 0", "did you mean 0.02"),
        (("--tolerance", "0.0001"), "is not above the rounding of BF16", "--dtype float32"),
        ((*OK, "--layers", "0"), "names layer 0 without routed experts", "are 1 to 2"),
        ((*OK, "--layers", "7-9"), "names a range without routed experts", "are 1 to 2"),
        ((*OK, "--layers", "x"), "'x' in layers is not a layer or a range", ""),
        (
            (*OK, "--projections", "gate"),
            "gate is not one of: gate_proj,",
            "did you mean 'gate_proj'",
        ),
        ((*OK, "--group-size", "3"), "group size 3 does not divide the 8 experts", "1, 2, 4, 8"),
        ((*OK, "--engine", "tensorly", "--joint", "gate_up"), "tensorly cannot share one U_I", ""),
        ((*OK, "--device", "cuda"), "device 'cuda' is not available", "--device cpu"),
        ((*OK, "--device", "npu"), "needs the package torch_npu", "tuckerize[npu]"),
        (("--recipe", "nowhere.yaml"), "there is no recipe file nowhere.yaml", "recipes list"),
    ],
)
def test_decompose_bad_option_says_what_to_change_and_writes_nothing(
    options: tuple[str, ...], message: str, hint: str, tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = run("decompose", "--model", tiny_model, *options, "--output", out)
    assert result.returncode == 2, result.stderr
    assert "error: " in result.stderr
    assert message in result.stderr
    assert hint in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not out.exists()


@pytest.mark.parametrize("command", ["inspect", "decompose"])
def test_model_that_is_nowhere_says_how_to_fetch_it(command: str, tmp_path: Path) -> None:
    options = ("--model", "DeepSeek-V2-Lite", *OK, "--output", tmp_path / "out")
    arguments = options if command == "decompose" else ("DeepSeek-V2-Lite",)
    result = run(command, *arguments)
    assert result.returncode == 2
    assert "deepseek-ai/DeepSeek-V2-Lite is not in the Hugging Face cache" in result.stderr
    assert "hf download deepseek-ai/DeepSeek-V2-Lite" in result.stderr


def test_output_in_the_source_is_refused(tiny_model: Path) -> None:
    before = files_of(tiny_model)
    for output in (tiny_model, tiny_model / "out", tiny_model.parent):
        result = run("decompose", "--model", tiny_model, *OK, "--output", output)
        assert result.returncode == 2
        assert "lie in one another" in result.stderr
    assert files_of(tiny_model) == before


def test_output_that_holds_something_else_is_kept_even_with_overwrite(
    tiny_model: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    for extra in ((), ("--overwrite",)):
        options = ("--model", tiny_model, *OK, "--output", precious, *extra)
        result = run("decompose", *options)
        assert result.returncode == 2
        assert "is not empty and was not written by tuckerize" in result.stderr
    assert files_of(precious) == {"thesis.txt": b"years of work"}


def test_finished_output_is_kept_unless_overwritten(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    succeed("decompose", "--model", tiny_model, *OK, "--output", out)
    before = files_of(out)
    result = run("decompose", "--model", tiny_model, "--keep", "0.5", "--output", out)
    assert result.returncode == 2
    assert "already holds a finished result" in result.stderr
    assert files_of(out) == before
    options = ("--model", tiny_model, "--keep", "0.5", "--output", out, "--overwrite")
    succeed("decompose", *options)
    assert files_of(out) != before
    succeed("decompose", "--model", tiny_model, *OK, "--output", out, "--overwrite")
    assert files_of(out) == before


def test_stack_with_nan_names_the_place_and_leaves_an_unfinished_folder(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.2.mlp.experts.5.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    result = run("decompose", "--model", model, *OK, "--output", tmp_path / "out")
    assert result.returncode == 2
    assert (
        "layer 2, group 0, up_proj: the stack holds nan at expert 5, intermediate 3, hidden 4"
        in result.stderr
    )
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert not (tmp_path / "out" / "tuckerize.json").exists()
    for command in (("shard", tmp_path / "out", "--tp", "2"), ("verify", tmp_path / "out")):
        result = run(*command)
        assert result.returncode == 2
        assert "is not a finished Tucker checkpoint" in result.stderr


def test_factors_that_overflow_the_output_type_are_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.experts.0.gate_proj.weight"].mul_(1e7)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    options = ("--keep", "0.7", "--dtype", "float16", "--output", tmp_path / "out")
    result = run("decompose", "--model", model, *options)
    assert result.returncode == 2
    assert "a core or factor overflows F16" in result.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' cannot be factored: it has no such module"),
        (
            {"model_type": "mixtral_x"},
            "is neither in the table of MoE families nor known to transformers",
        ),
        ({"quantization_config": "fp8"}, "quantization_config = 'fp8', expected an object"),
        ({"moe_intermediate_size": 25}, "has shape [24, 32], expected [25, 32]"),
        ({"n_routed_experts": 9}, "experts.8.gate_proj.weight is missing"),
        ({"n_routed_experts": 7}, "which the family deepseek_v2 with 7 experts does not know"),
        ({"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc'"),
        ({"topk_method": None}, "topk_method = 'None'"),
    ],
)
def test_unsupported_or_contradictory_source_is_refused(
    change: dict[str, object], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **change}))
    result = run("decompose", "--model", model, *OK, "--output", tmp_path / "out")
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_number_of_experts_is_that_of_the_tensors_where_two_keys_differ(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = make_tiny_family(tmp_path / "model", "qwen3_moe", experts=5)
    config = json.loads((model / "config.json").read_text())
    for one, other in ((5, 128), (128, 5)):
        changed = {**config, "num_experts": one, "num_local_experts": other}
        (model / "config.json").write_text(json.dumps(changed))
        assert inspect(model).shape.experts == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "softplus_of_the_future"}, "hidden_act 'softplus_of_the_future'"),
        ({"routed_scaling_factor": [1.0]}, "describes a routing that is not possible"),
    ],
)
def test_model_that_could_not_be_verified_is_refused_before_the_work(
    change: dict[str, object], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **change}))
    result = run("decompose", "--model", model, *OK, "--output", tmp_path / "out")
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_classifier_is_decomposed_without_a_text_and_told_so_with_one(tmp_path: Path) -> None:
    folder = add_tokenizer(make_tiny_family(tmp_path / "causal", "qwen3_moe"))
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    model.save_pretrained(tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    text = write_text(tmp_path / "text.txt", 600)
    command = ("decompose", "--model", tmp_path / "model", *OK, "--output", tmp_path / "out")
    result = run(*command, "--calibration", text, "--calibration-tokens", "512")
    assert result.returncode == 2
    assert "Qwen3MoeForSequenceClassification, which predicts no text" in result.stderr
    succeed(*command)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tp", "0"), "--tp 0 is not a number of processes"),
        (("--tp", "25", "--layout", "intermediate"), "splits a size of 24, which is not enough"),
        (("--tp", "23", "--layout", "rank"), "use --tp 22 or less"),
    ],
)
def test_shard_mesh_that_does_not_fit_is_refused(
    options: tuple[str, ...], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    succeed("decompose", "--model", tiny_model, "--rank", "full,full,22", "--output", out)
    before = files_of(out)
    result = run("shard", out, *options)
    assert result.returncode == 2
    assert message in result.stderr
    assert files_of(out) == before


def test_verify_with_another_model_as_source_is_refused(
    tiny_model: Path, tiny_sharded_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    succeed("decompose", "--model", tiny_model, *OK, "--output", out)
    result = run("verify", out, "--model", tiny_sharded_model)
    assert result.returncode == 2
    assert "is not the checkpoint that" in result.stderr


def test_verify_without_source_says_what_is_missing(tiny_model: Path, tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_model, model)
    succeed("decompose", "--model", model, *OK, "--output", out)
    shutil.rmtree(model)
    result = run("verify", out)
    assert result.returncode == 0
    assert "note: without the source there is no comparison with the dense model" in result.stderr
    result = run("verify", out, "--max-output-error", "0.5")
    assert result.returncode == 2
    assert "--max-output-error needs the source" in result.stderr


def test_verify_damaged_tucker_checkpoint_fails(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    succeed("decompose", "--model", tiny_model, *OK, "--output", out)
    path = sorted(out.glob("*.safetensors"))[1]
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("core"))
    tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})
    result = run("verify", out)
    assert result.returncode == 1
    assert "its SHA-256 is not the manifest's" in result.stdout.replace("\n", " ")


@pytest.mark.parametrize(
    ("name", "message"),
    [("adapter_config.json", "holds a LoRA adapter"), ("model-Q4.gguf", "holds a GGUF file")],
)
def test_folder_of_another_format_is_named_as_such(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    result = run("inspect", tmp_path)
    assert result.returncode == 2
    assert f"{tmp_path} {message}" in result.stderr
    assert "hint: " in result.stderr


def test_dense_model_is_said_to_have_no_experts(tmp_path: Path, tiny_model: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "config.json").write_text(json.dumps({"model_type": "qwen2", "hidden_size": 32}))
    result = run("inspect", model)
    assert result.returncode == 2
    assert "model_type 'qwen2' in config.json is not a supported MoE family: the configuration" in (
        result.stderr
    )


def test_keep_as_a_percentage_is_the_share(tiny_model: Path) -> None:
    size = ("decompose", "--model", tiny_model, "--dry-run", "--json", "--keep")
    plans = [json.loads(succeed(*size, text)) for text in ("0.7", "70%")]
    assert plans[0]["after"] == plans[1]["after"]
    assert plans[0]["stacks"] == plans[1]["stacks"]


@pytest.mark.parametrize("command", ["inspect", "evaluate"])
def test_long_path_is_not_broken_in_a_table(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path, text: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    folder = shutil.copytree(model, tmp_path / ("long" * 40))
    options = {"evaluate": ("--text", text, "--tokens", "64", "--window", "32")}
    assert str(folder) in succeed(command, folder, *options.get(command, ()))

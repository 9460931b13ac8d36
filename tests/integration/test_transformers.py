"""Tucker checkpoints in transformers: the real loader, on checkpoints that the commands wrote."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from tests.running import succeed, torchrun
from tuckerize import (
    DecomposeRequest,
    GenerateRequest,
    ReconstructRequest,
    decompose,
    generate,
    inspect,
    reconstruct,
)
from tuckerize.errors import CheckpointError
from tuckerize.runtime.experts import TuckerExperts
from tuckerize.version import INSTALL

IDS = torch.arange(3, 43)[None]

CALIBRATION = {"tokens": 2048, "multiple": 2, "refine": 0}
WAYS: dict[str, dict[str, Any]] = {
    "hidden mode": {"keep": 0.6},
    "all modes": {"rank": "5,16,20"},
    "groups": {"rank": "full,16,20", "group_size": 4},
    "one U_I": {"rank": "full,full,20", "joint": "gate_up"},
    "one layer": {"keep": 0.6, "layers": "2"},
    "calibrated": {"keep": 0.6, "calibration": CALIBRATION},
    "equal widths": {"keep": 0.6, "calibration": {**CALIBRATION, "equal_widths": True}},
}


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def outputs(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Tucker checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("outputs")
    found = {}
    for name, options in WAYS.items():
        found[name] = folder / name
        own = dict(options)
        if "calibration" in own:
            own["calibration"] = {"texts": [str(text)], **own["calibration"]}
        decompose(DecomposeRequest(model=model, output=found[name], **own))
    return found


def load(folder: Path, dtype: torch.dtype = torch.float32, **settings: object) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **settings)
    return loaded


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    found: Tensor = model(IDS).logits.float()
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("way", WAYS)
def test_model_computes_what_the_reconstruction_does(
    way: str, outputs: dict[str, Path], tmp_path: Path
) -> None:
    reconstruct(ReconstructRequest(folder=outputs[way], output=tmp_path / "dense"))
    dense, factored = load(tmp_path / "dense"), load(outputs[way])
    assert relative(logits(factored), logits(dense)) < 1e-5
    assert factored.num_parameters() < dense.num_parameters()
    new = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(factored.generate(IDS, **new), dense.generate(IDS, **new))  # type: ignore[operator]


@pytest.mark.parametrize("way", ["all modes", "calibrated", "one layer"])
def test_saved_model_is_the_same_bit_for_bit(
    way: str, outputs: dict[str, Path], tmp_path: Path
) -> None:
    before = load(outputs[way])
    before.save_pretrained(tmp_path / "again")
    after = load(tmp_path / "again").state_dict()
    assert after.keys() == before.state_dict().keys()
    assert all(torch.equal(after[name], value) for name, value in before.state_dict().items())
    announced = [
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (outputs[way], tmp_path / "again")
    ]
    assert announced[0] == announced[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["all modes", "calibrated"])
def test_other_types_are_the_same_up_to_their_rounding(
    way: str, dtype: torch.dtype, outputs: dict[str, Path]
) -> None:
    exact = logits(load(outputs[way]))
    model = load(outputs[way], dtype)
    # transformers 5.24 keeps the routers of the dense model in float32 as well.
    others = {name for name, value in model.named_parameters() if value.dtype != dtype}
    assert all(name.endswith(".mlp.gate.weight") for name in others)
    assert relative(logits(model), exact) < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("way", ["all modes", "calibrated", "groups"])
def test_every_factor_is_trained(way: str, outputs: dict[str, Path]) -> None:
    model = load(outputs[way])
    model.train()
    ids = torch.randint(3, 60, (1, 400), generator=torch.Generator().manual_seed(0))
    loss = model(ids, labels=ids).loss  # tokens for every expert
    loss.backward()
    modules = [module for module in model.modules() if isinstance(module, TuckerExperts)]
    assert len(modules) == 2
    for module in modules:
        for name, value in module.named_parameters():
            assert value.grad is not None, name
    parameters = [value for module in modules for value in module.parameters()]
    torch.optim.SGD(parameters, lr=0.05).step()
    assert model(ids, labels=ids).loss < loss


def test_trainer_trains_and_its_checkpoint_loads(outputs: dict[str, Path], tmp_path: Path) -> None:
    model = load(outputs["one U_I"])
    before = {name: value.clone() for name, value in model.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, learning_rate=1e-3, report_to=[], use_cpu=True
    )
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8
    Trainer(model, arguments, train_dataset=rows).train()
    again = load(tmp_path / "checkpoint-2")
    trained = {n for n, v in again.named_parameters() if not torch.equal(v, before[n])}
    assert trained >= {name for name in before if ".group_" in name}
    assert all(torch.equal(v, model.get_parameter(n)) for n, v in again.named_parameters())


@pytest.mark.parametrize("place", ["cpu", "auto"])
def test_device_map_is_obeyed(place: str, outputs: dict[str, Path]) -> None:
    model = load(outputs["calibrated"], device_map=place)
    assert relative(logits(model), logits(load(outputs["calibrated"]))) < 1e-6


@pytest.mark.parametrize("way", ["one layer", "calibrated"])
def test_checkpoint_imports_what_it_needs_if_its_code_is_trusted(
    way: str, outputs: dict[str, Path], tmp_path: Path
) -> None:
    """In a process that does not import tuckerize itself; saved and loaded once more."""
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM as Auto\n"
        "assert 'tuckerize' not in sys.modules\n"
        "model = Auto.from_pretrained(sys.argv[1], dtype=torch.float32, trust_remote_code=True)\n"
        "torch.save(model(torch.arange(3, 43)[None]).logits.detach(), sys.argv[3])\n"
        "model.save_pretrained(sys.argv[2])\n"
        "again = Auto.from_pretrained(sys.argv[2], dtype=torch.float32, trust_remote_code=True)\n"
        "pairs = zip(model.parameters(), again.parameters(), strict=True)\n"
        "assert all(torch.equal(one, other) for one, other in pairs)\n"
    )
    again, result = tmp_path / "again", tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", script, outputs[way], again, result], check=True)
    assert relative(torch.load(result), logits(load(outputs[way]))) < 1e-6


ABSENT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "tuckerize":
            raise ModuleNotFoundError("No module named 'tuckerize'", name=name)
sys.meta_path.insert(0, Absent())
"""
FROM_SOURCE = f"from its source checkout: {INSTALL}"
ONLY_A_FOLDER = """
import sys, pathlib
sys.path = [p for p in sys.path if not pathlib.Path(p, "tuckerize", "__init__.py").exists()]
sys.path.append(sys.argv[2])
"""


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (ABSENT, "No module named 'tuckerize'"),
        (ONLY_A_FOLDER, "cannot import name '__version__' from 'tuckerize'"),
    ],
    ids=["absent", "only a folder"],
)
def test_trusted_checkpoint_says_that_the_package_is_missing(
    setup: str, message: str, outputs: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "tuckerize").mkdir()
    load = (
        "from transformers import AutoModelForCausalLM as Auto\n"
        "Auto.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", setup + load, outputs["hidden mode"], tmp_path],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 1
    assert message in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last == f"ImportError: this checkpoint needs the package tuckerize, {FROM_SOURCE}"


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    script = (
        "import sys, tuckerize\n"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
        "import transformers.quantizers.auto as auto\n"
        "assert 'tuckerize' in auto.AUTO_QUANTIZER_MAPPING\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_other_format_is_refused(outputs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(outputs["hidden mode"], out)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["format_version"] = 1
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format_version 1, this tuckerize reads 2"):
        load(out)


@pytest.mark.parametrize("way", WAYS)
def test_inspect_says_how_it_is_loaded(way: str, outputs: dict[str, Path], tmp_path: Path) -> None:
    assert "needs 'import tuckerize' or trust_remote_code=True" in succeed("inspect", outputs[way])
    out = shutil.copytree(outputs[way], tmp_path / "out")
    (out / "tuckerize_modeling.py").unlink()
    assert "needs 'import tuckerize': random experts without" in succeed("inspect", out)


def test_inspect_refuses_what_would_not_be_loaded(outputs: dict[str, Path], tmp_path: Path) -> None:
    out = shutil.copytree(outputs["all modes"], tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    path, [group] = next(iter(config["quantization_config"]["modules"].items()))
    place = f"{path}.group_0.gate_proj.U_H"

    def refused(changed: dict[str, object]) -> str:
        (out / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError) as caught:
            inspect(out)
        return caught.value.message

    assert "has no quantization_config of tuckerize" in refused(
        {**config, "quantization_config": {}}
    )
    group["gate_proj"] = [5, 15, 20]
    assert f"announces {place} as (24, 15), the weight files have it as (24, 16)" in refused(config)
    del config["quantization_config"]["modules"][path]
    assert "as absent" in refused(config)
    config["quantization_config"]["format_version"] = 1
    assert "format_version 1, this tuckerize reads 2" in refused(config)


def test_processes_of_a_plan_split_the_neurons_and_train_all_of_them(
    outputs: dict[str, Path],
) -> None:
    script = Path(__file__).parents[1] / "distributed" / "transformers_tp.py"
    ways = ("hidden mode", "all modes", "groups", "calibrated")
    result = torchrun(2, script, *(outputs[way] for way in ways))
    assert result.returncode == 0, result.stderr


def test_card_and_loader_are_written_and_the_card_of_the_source_comes_back(
    model: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(model, source)
    card = "---\nlicense: mit\ntags: [tiny]\n---\n# A tiny model\n"
    (source / "README.md").write_text(card)
    config = json.loads((source / "config.json").read_text())
    remote = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    (source / "config.json").write_text(json.dumps({**config, "auto_map": remote}))
    out, dense = tmp_path / "out", tmp_path / "dense"
    decompose(DecomposeRequest(model=source, keep=0.7, output=out))
    ours = (out / "README.md").read_text()
    assert "license: mit" in ours
    assert "- tiny\n- tuckerize\n" in ours
    assert ours.index("import tuckerize") < ours.index("from_pretrained")
    auto_map = json.loads((out / "config.json").read_text())["auto_map"]
    assert auto_map == {"AutoModelForCausalLM": "tuckerize_modeling.DeepseekV2ForCausalLM"}
    reconstruct(ReconstructRequest(folder=out, output=dense))
    assert (dense / "README.md").read_text() == card
    assert json.loads((dense / "config.json").read_text())["auto_map"] == remote
    left = {path.name for path in dense.iterdir()}
    assert not left & {"README.source.md", "tuckerize_modeling.py"}


@pytest.mark.parametrize("card", ["---\nlicense: [\n---\nbroken", "no front matter", "---"])
def test_card_of_the_source_that_cannot_be_read_stops_nothing(
    card: str, model: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(model, source)
    (source / "README.md").write_text(card)
    decompose(DecomposeRequest(model=source, keep=0.7, output=out))
    assert "import tuckerize" in (out / "README.md").read_text()
    assert (out / "README.source.md").read_text() == card


def test_generate_continues_a_prompt(outputs: dict[str, Path], model: Path) -> None:
    found = succeed("generate", outputs["calibrated"], "--prompt", "17 11", "--tokens", "5")
    assert found.startswith("17 11")
    assert len(found.split()) == 7
    with pytest.raises(CheckpointError) as caught:
        generate(GenerateRequest(folder=model, prompt="x"))
    assert "is not a finished Tucker checkpoint" in f"{caught.value.message} {caught.value.hint}"

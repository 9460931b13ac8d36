from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tuckerize.domain import TensorHeader
from tuckerize.errors import CheckpointError
from tuckerize.format.consistency import carries_loader, check_loadable
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint

GOLDEN = Path(__file__).parents[2] / "golden" / "v0.1"
MODULE = "model.layers.1.mlp.experts"
HINT = "the folder was changed: run 'tuckerize decompose' with --overwrite"


@pytest.fixture(scope="module")
def tucker() -> TuckerCheckpoint:
    return TuckerCheckpoint.open(GOLDEN / "tucker")


def with_config(
    tucker: TuckerCheckpoint, change: Callable[[dict[str, Any]], object]
) -> TuckerCheckpoint:
    config = copy.deepcopy(tucker.config)
    change(config)
    return replace(tucker, checkpoint=replace(tucker.checkpoint, config=config))


def with_tensors(tucker: TuckerCheckpoint, **headers: TensorHeader | None) -> TuckerCheckpoint:
    """With headers added or changed, or without those that are None."""
    tensors = {**tucker.checkpoint.tensors, **headers}
    kept = {name: header for name, header in tensors.items() if header is not None}
    return replace(tucker, checkpoint=replace(tucker.checkpoint, tensors=kept))


def refusal(tucker: TuckerCheckpoint) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_loadable(tucker)
    assert caught.value.hint == HINT
    return caught.value.message.removeprefix(f"{tucker.folder / 'config.json'}")


@pytest.mark.parametrize("name", ["tucker", "data-free", "calibrated"])
def test_checkpoints_are_consistent_as_written(name: str) -> None:
    check_loadable(TuckerCheckpoint.open(GOLDEN / name))


def test_configuration_without_a_description_is_refused(tucker: TuckerCheckpoint) -> None:
    without = with_config(tucker, lambda config: config.pop("quantization_config"))
    assert refusal(without) == " has no quantization_config of tuckerize"
    other = with_config(tucker, lambda c: c["quantization_config"].update(quant_method="fp8"))
    assert refusal(other) == " has no quantization_config of tuckerize"


def test_malformed_description_is_refused_by_its_key(tucker: TuckerCheckpoint) -> None:
    broken = with_config(tucker, lambda config: config["quantization_config"].pop("group_size"))
    assert refusal(broken) == ": quantization_config.group_size: Field required"
    older = with_config(tucker, lambda c: c["quantization_config"].update(format_version=1))
    assert refusal(older).startswith(
        ": the checkpoint has format_version 1, this tuckerize reads 2"
    )


def test_core_size_that_is_not_that_of_the_file_is_refused(tucker: TuckerCheckpoint) -> None:
    def shorten(config: dict[str, Any]) -> None:
        config["quantization_config"]["modules"][MODULE][0]["up_proj"][1] -= 1

    assert refusal(with_config(tucker, shorten)) == (
        f" announces {MODULE}.group_0.up_proj.U_H as (24, 15), the weight files have it as (24, 16)"
    )


def test_module_that_is_not_described_is_refused(tucker: TuckerCheckpoint) -> None:
    def forget(config: dict[str, Any]) -> None:
        del config["quantization_config"]["modules"][MODULE]

    message = refusal(with_config(tucker, forget))
    assert message.startswith(f" announces {MODULE}.group_0.down_proj.U_E as absent, ")


def test_tensor_that_is_missing_is_refused(tucker: TuckerCheckpoint) -> None:
    name = f"{MODULE}.group_0.gate_proj.core"
    message = refusal(with_tensors(tucker, **{name: None}))
    assert message == f" announces {name} as (3, 16, 24), the weight files have it as absent"


@pytest.mark.parametrize("below", ["0.gate_proj.weight", "group_0.gate_proj.bias", "group_1.x"])
def test_tensor_of_a_factored_module_that_is_not_described_is_refused(
    tucker: TuckerCheckpoint, below: str
) -> None:
    name = f"{MODULE}.{below}"
    message = refusal(with_tensors(tucker, **{name: TensorHeader("BF16", (2,), 4)}))
    assert message == f" announces {name} as absent, the weight files have it as (2,)"


def test_loader_must_be_named_and_present(tucker: TuckerCheckpoint) -> None:
    assert carries_loader(tucker)
    named = {"AutoModelForCausalLM": "modeling_other.Model"}
    assert not carries_loader(with_config(tucker, lambda c: c.update(auto_map=named)))
    assert not carries_loader(with_config(tucker, lambda c: c.pop("auto_map")))
    assert not carries_loader(TuckerCheckpoint.open(GOLDEN / "calibrated"))

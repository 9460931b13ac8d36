"""Activations against the functions of the families in transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import model_type_to_module_name

from tuckerize.errors import CheckpointError
from tuckerize.moe.family import Glu
from tuckerize.moe.lookup import glu_of
from tuckerize.runtime.activations import activation_of

CLAMPED = {
    "deepseek_v4": "DeepseekV4Experts",
    "glm5_next_text": "Glm5NextTextExperts",
    "gpt_oss": "GptOssExperts",
    "hy_v4": "HYV4Experts",
    "minimax_m3_vl_text": "MiniMaxM3VLExperts",
    "step3p5": "Step3p7Experts",
}


def experts_in_transformers(model_type: str, config: Any) -> Any:  # noqa: ANN401
    """A family's module of experts, without memory."""
    name = model_type_to_module_name(model_type)
    module = __import__(f"transformers.models.{name}.modeling_{name}", fromlist=[""])
    kind = getattr(module, CLAMPED[model_type])
    limits = getattr(config, "swiglu_limits", None)
    with torch.device("meta"):
        return kind(config, swiglu_limit=limits[3]) if limits else kind(config)


@pytest.mark.parametrize("model_type", sorted(CLAMPED))
def test_activation_is_that_of_the_family_in_transformers(model_type: str) -> None:
    limits = {"swiglu_limits": [None, 0.0, 0.0, 7.0]} if model_type == "step3p5" else {}
    config = AutoConfig.for_model(model_type, **limits)
    experts = experts_in_transformers(model_type, config)
    gate, up = 8 * torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(0))
    interleaved = not getattr(experts, "is_concatenated", True)
    both = torch.stack([gate, up], -1).flatten(1) if interleaved else torch.cat([gate, up], -1)
    found = activation_of(glu_of(config.to_dict(), "model.layers.3.mlp.experts"))(gate, up)
    assert float(both.abs().max()) > 10  # beyond every limit
    torch.testing.assert_close(found, experts._apply_gate(both))


def test_layers_have_limits_of_their_own() -> None:
    config = {"model_type": "step3p5", "swiglu_limits": [None, 0.0, 7.0]}
    found = [glu_of(config, f"model.layers.{layer}.moe").limit for layer in range(3)]
    assert found == [None, None, 7.0]
    config.pop("swiglu_limits")
    assert glu_of(config, "model.layers.2.moe") == Glu()


def test_unknown_activation_is_named() -> None:
    with pytest.raises(CheckpointError, match="hidden_act 'mish'"):
        activation_of(Glu("mish"))

"""Every MoE architecture of the installed transformers is done, or is refused with a reason."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import transformers
from transformers import MODEL_MAPPING
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name

from tests.tiny_families import INFERRED, NOT_TESTED
from tuckerize.moe.families import FAMILIES, UNSUPPORTED
from tuckerize.moe.family import EXPERTS_KEYS

MODELS = Path(transformers.__file__).parent / "models"
KNOWN = {*FAMILIES, *INFERRED, *UNSUPPORTED, *NOT_TESTED}


def has_experts(model_type: str) -> bool:
    """Whether a type's own configuration counts experts, and its model has modules of them."""
    module = model_type_to_module_name(model_type)
    source = MODELS / module / f"modeling_{module}.py"
    config = CONFIG_MAPPING[model_type]
    if not source.exists() and config in MODEL_MAPPING:  # it has another family's model
        found: Any = MODEL_MAPPING[config]
        source = Path(inspect.getfile(found[0] if isinstance(found, tuple) else found))
    if not source.exists() or not re.search(r"^class \w*Experts?\b", source.read_text(), re.M):
        return False
    fields = getattr(config, "__dataclass_fields__", {})
    return any(key in fields or hasattr(config, key) for key in EXPERTS_KEYS)


def test_architectures_with_experts_are_accounted_for() -> None:
    found = [model_type for model_type in list(CONFIG_MAPPING) if has_experts(model_type)]
    assert len(found) > 50
    assert not [name for name in found if not {name, name.removesuffix("_text")} & KNOWN]

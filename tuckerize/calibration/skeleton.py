"""A model of transformers without weights, and where its tensors are in a checkpoint."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tuckerize.checkpoint.reader import Checkpoint
from tuckerize.errors import CheckpointError

# What transformers raises for values of config.json that it does not expect.
_INVALID = (OSError, LookupError, ValueError, TypeError, AttributeError)


def build_empty(source: Checkpoint, device: torch.device, dtype: torch.dtype | None) -> Any:  # noqa: ANN401
    """The model without weights; buffers that no checkpoint has are computed."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(
            source.folder, local_files_only=True, trust_remote_code=False
        )
        if dtype is None:
            dtype = torch.float32 if device.type == "cpu" else config.dtype
        with torch.device("meta"), warnings.catch_warnings():
            # Of a model without shared experts, which has empty tensors in their place.
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            kinds: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText)
            auto = next((kind for kind in kinds if type(config) in kind._model_mapping), None)
            if auto is None:
                raise CheckpointError(
                    f"a model of type '{config.model_type}' predicts no text",
                    hint="decompose it without --calibration",
                )
            model = auto.from_config(config, dtype=dtype, trust_remote_code=False)
    except (*_INVALID, StrictDataclassError) as error:
        raise CheckpointError(
            f"transformers cannot build the model of {source.folder}: {error}",
            hint="repair config.json, or install the release of transformers that it names"
            if sys.flags.optimize < 2
            else "transformers needs its docstrings: unset PYTHONOPTIMIZE, or set it to 1",
        ) from error
    _compute_buffers(model, device)
    return model.eval()


@torch.no_grad()
def _compute_buffers(model: Any, device: torch.device) -> None:  # noqa: ANN401
    """Compute the buffers that are not in checkpoints, such as rotary frequencies.

    transformers builds every model without memory and has each family's `_init_weights` compute
    them; parameters are empty here, so it leaves them alone.
    """
    for path, module in model.named_modules():
        names = sorted(module._non_persistent_buffers_set)
        names = [name for name in names if module._buffers[name] is not None]
        for name in names:
            buffer = torch.empty_like(module._buffers[name], device="cpu")
            module._buffers[name] = buffer
            if buffer.is_floating_point():
                buffer.fill_(torch.nan)  # to see below whether it has been computed
        if names:
            model._init_weights(module)
        for name in names:
            if module._buffers[name].isnan().any():
                raise CheckpointError(
                    f"transformers does not say how to compute the buffer {path}.{name}",
                    hint="streaming does not support this family",
                )
            module._buffers[name] = module._buffers[name].to(device)


def decoder_of(model: Any) -> Any:  # noqa: ANN401
    """The part of a model that has the decoder layers."""
    found = model.get_decoder()
    return found if hasattr(found, "layers") else found.model  # Llama 4 says that it is all of it


def text_parts(model: Any) -> tuple[str, ...]:  # noqa: ANN401
    """Beginnings of the names of tensors that texts need: not those of images, say."""
    parts = (decoder_of(model), model.get_output_embeddings())
    return tuple(f"{name}." for name, found in model.named_modules() if found in parts)


class OnDisk(NamedTuple):
    """Tensors of a checkpoint that one of the model is made of.

    Attributes:
        names: Their names, in order.
        dimension: Along which they are concatenated, if there are several, or cut.
        part: Where the tensor of the model lies in that of the checkpoint, of which length; None
            if it is all of it.
    """

    names: tuple[str, ...]
    dimension: int = 0
    part: tuple[slice, int] | None = None

    def joined(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The tensor of the model from those of the checkpoint by name."""
        own = [parts[name] for name in self.names]
        whole = own[0] if len(own) == 1 else torch.cat(own, self.dimension)
        if self.part is None:
            return whole
        place, _ = self.part
        return whole.narrow(self.dimension, place.start, place.stop - place.start)

    def shape(self, shapes: Sequence[tuple[int, ...]]) -> list[int]:
        """Shape of the tensor of the model; of one that cannot be cut so, its own."""
        found = list(shapes[0])
        if len(shapes) > 1:
            found[self.dimension] = sum(shape[self.dimension] for shape in shapes if shape)
        if self.part is not None and found[self.dimension : self.dimension + 1] == [self.part[1]]:
            found[self.dimension] = self.part[0].stop - self.part[0].start
        return found


class NamesOnDisk:
    """Names in checkpoints of a model's tensors, as transformers' own conversion maps them.

    Args:
        model: The model.
    """

    def __init__(self, model: Any) -> None:  # noqa: ANN401
        from transformers import core_model_loading
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(model)
        self._base = model.base_model_prefix
        self._tensors = model.state_dict()
        self._modules = {name for name, _ in model.named_modules()}
        self._tied = model.all_tied_weights_keys
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._split: Any = getattr(core_model_loading, "Split", ())  # early releases have none
        self._known = [
            entry
            for entry in converters
            if len(entry.operations) == 1
            and isinstance(entry.operations[0], (Concatenate, self._split or Concatenate))
        ]
        self._others = [entry for entry in converters if entry not in self._known]

    def module(self, path: str) -> str:
        """Path in the model of a module of experts."""
        inside = ".0"  # renamings look at what is below a module
        found = self._rename(f"{path}{inside}", [])[0].removesuffix(inside)
        within = f"{self._base}.{found}"  # files may hold the decoder alone
        return within if within in self._modules else found

    def _rename(self, name: str, converters: list[Any]) -> tuple[str, str | None]:
        """Name in the model, and the pattern of the converter that makes it, as on loading."""
        from transformers.core_model_loading import rename_source_key

        where = (self._base, self._tensors)
        found: tuple[str, str | None] = rename_source_key(name, self._renamings, converters, *where)
        if found[0] not in self._tensors and name in self._tensors:  # it has its name already
            found = rename_source_key(name, [], [], *where)
        return found

    def of(self, stored: Iterable[str]) -> dict[str, OnDisk]:
        """Tensors of a checkpoint by the name in the model of what is made of them.

        Args:
            stored: Names of the tensors of the checkpoint.
        """
        found: dict[str, OnDisk] = {}
        parts: dict[str, list[tuple[int, str, int]]] = {}
        for name in stored:
            own, pattern = self._rename(name, self._known)
            if pattern is None:
                found[own] = OnDisk((name,))
                continue
            entry = next(entry for entry in self._known if pattern in entry.source_patterns)
            made: Any = entry.operations[0]
            if isinstance(made, self._split):
                found |= self._cut(name, own, entry.target_patterns, made.dim)
                continue
            place = entry.source_patterns.index(pattern)
            parts.setdefault(own, []).append((place, name, made.dim))
        for own, several in parts.items():
            found[own] = OnDisk(tuple(name for _, name, _ in sorted(several)), several[0][2])
        for one, other in self._tied.items():
            found.setdefault(one, found.get(other, OnDisk((other,))))
            found.setdefault(other, found[one])
        return found

    def _cut(
        self, name: str, first: str, targets: Sequence[str], dimension: int
    ) -> dict[str, OnDisk]:
        """Tensors of the model that one of the checkpoint is cut into, by name.

        Args:
            name: Name of the tensor of the checkpoint.
            first: Name of the first of those of the model.
            targets: What stands in their names, in order, instead of what stands in the first.
            dimension: Along which it is cut.
        """
        names = [first.replace(targets[0], target) for target in targets]
        ends = [*accumulate(self._tensors[own].shape[dimension] for own in names)]
        places = map(slice, [0, *ends], ends)
        return {
            own: OnDisk((name,), dimension, (place, ends[-1]))
            for own, place in zip(names, places, strict=True)
        }

    def is_made(self, name: str) -> bool:
        """Whether transformers makes a tensor of the model in another way than joining."""
        targets = (pattern for entry in self._others for pattern in entry.target_patterns)
        return any(re.search(pattern, name) for pattern in targets)


def check_tensors(
    source: Checkpoint,
    wanted: Mapping[str, Tensor],
    on_disk: Mapping[str, OnDisk],
    names: NamesOnDisk,
) -> None:
    """Check that a checkpoint has every tensor of the model, in its shape.

    Raises:
        CheckpointError: It has not, or transformers makes one of them in a way that is not known.
    """
    stored = {name: on_disk.get(name, OnDisk((name,))) for name in wanted}
    missing = [n for n, own in stored.items() if not all(p in source.tensors for p in own.names)]
    if made := [name for name in missing if names.is_made(name)]:
        raise CheckpointError(
            f"transformers makes {made[0]} of several tensors, which streaming does not support",
            hint="decompose without calibration",
        )
    architectures = source.config.get("architectures")
    kind = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if missing and kind and not kind.endswith(("ForCausalLM", "ForConditionalGeneration")):
        raise CheckpointError(
            f"{source.folder} holds a {kind}, which predicts no text: it lacks {missing[0]}",
            hint="decompose it without --calibration",
        )
    if missing:
        raise CheckpointError(
            f"{source.folder} lacks {len(missing)} tensors of the model: {', '.join(missing[:5])}",
            hint="the checkpoint is incomplete: fetch it again",
        )
    for name, tensor in wanted.items():
        own = stored[name]
        shape = own.shape([source.tensors[part].shape for part in own.names])
        if shape != list(tensor.shape):
            raise CheckpointError(
                f"the tensor {' + '.join(own.names)} has shape {shape}, "
                f"expected {list(tensor.shape)}",
                hint="check the sizes in config.json",
            )

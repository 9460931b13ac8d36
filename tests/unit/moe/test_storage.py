from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu
from transformers import GptOssConfig, Llama4TextConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from tuckerize.checkpoint.files import write_json
from tuckerize.checkpoint.reader import Checkpoint
from tuckerize.checkpoint.weight_set import CONFIG, SINGLE_FILE
from tuckerize.checkpoint.writer import write_tensors
from tuckerize.domain import Projection, StackShape
from tuckerize.moe.storage import Packed, PerExpert, Storage

GATE_UP_DOWN = PerExpert(
    gate="{expert}.gate_proj.weight", up="{expert}.up_proj.weight", down="{expert}.down_proj.weight"
)
NUMBERED = PerExpert(gate="{expert}.w1.weight", up="{expert}.w3.weight", down="{expert}.w2.weight")
PACKED = [
    Packed("gate_up_proj", "down_proj", interleaved=interleaved, transposed=transposed)
    for interleaved, transposed in itertools.product((False, True), repeat=2)
]
STORAGES: list[Storage] = [GATE_UP_DOWN, NUMBERED, *PACKED]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPE = StackShape(4, 3, 5)


def element(
    storage: Storage, tensors: dict[str, Tensor], projection: Projection, e: int, h: int, i: int
) -> float:
    """Entry (e, h, i) of a stack, looked up by explicit indices."""
    down = projection == Projection.DOWN
    if isinstance(storage, PerExpert):
        names = {
            Projection.GATE: storage.gate,
            Projection.UP: storage.up,
            Projection.DOWN: storage.down,
        }
        weight = tensors[names[projection].replace("{expert}", str(e))]
        return weight[i, h].item() if down else weight[h, i].item()
    assert isinstance(storage, Packed)
    if down:
        packed = tensors[storage.down]
        return packed[e, h, i].item() if storage.transposed else packed[e, i, h].item()
    packed = tensors[storage.gate_up]
    rows = packed.shape[2 if storage.transposed else 1] // 2
    if storage.interleaved:
        row = 2 * h + (projection == Projection.UP)
    else:
        row = h + rows * (projection == Projection.UP)
    return packed[e, i, row].item() if storage.transposed else packed[e, row, i].item()


def saved(tensors: dict[str, Tensor], folder: Path) -> Checkpoint:
    write_json(folder / CONFIG, {})
    write_tensors(folder / SINGLE_FILE, tensors)
    return Checkpoint.open(folder)


def read_stack(
    storage: Storage, checkpoint: Checkpoint, projection: Projection, experts: range, like: Tensor
) -> Tensor:
    stack = torch.full((len(experts), *like.shape[1:]), torch.nan, dtype=like.dtype)
    storage.read_into(stack, checkpoint, projection, experts)
    return stack


def written(
    storage: Storage, stacks: dict[Projection, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """All tensors of a layer, written as reconstruct does: projections that belong together."""
    shape = StackShape(*stacks[Projection.GATE].shape)
    tensors: dict[str, Tensor] = {}
    for projections in storage.together:
        matrices = (
            (projection, expert, matrix)
            for projection in projections
            for expert, matrix in enumerate(stacks[projection])
        )
        part = storage.write(shape, projections, matrices, dtype)
        assert not part.keys() & tensors.keys()
        tensors |= part
    return tensors


@given(
    storage=st.sampled_from(STORAGES),
    module=st.sampled_from(["", "model.layers.3.mlp.experts"]),
    shape=st.builds(StackShape, st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_experts_that_are_written_are_read(
    storage: Storage,
    module: str,
    shape: StackShape,
    dtype: torch.dtype,
    seed: int,
    data: st.DataObject,
) -> None:
    storage = storage.within(module) if module else storage
    generator = torch.Generator().manual_seed(seed)
    stacks = {p: torch.randn(shape, generator=generator).to(dtype) for p in Projection}
    tensors = written(storage, stacks, dtype)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == storage.tensors(shape)
    assert all(name.startswith(module) for name in tensors)
    start = data.draw(st.integers(0, shape.experts - 1))
    experts = range(start, data.draw(st.integers(start + 1, shape.experts)))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = saved(tensors, Path(folder))
        for projection, stack in stacks.items():
            read = read_stack(storage, checkpoint, projection, experts, stack)
            assert torch.equal(read, stack[experts.start : experts.stop])


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_every_entry_lies_where_explicit_indices_find_it(storage: Storage) -> None:
    numbers = torch.arange(3.0 * SHAPE.parameters).view(3, *SHAPE)
    stacks = dict(zip(Projection, numbers, strict=True))
    tensors = written(storage, stacks, torch.float32)
    for projection, stack in stacks.items():
        for place in itertools.product(*map(range, SHAPE)):
            assert element(storage, tensors, projection, *place) == stack[place].item()


def test_names_of_projections_are_those_of_their_tensors() -> None:
    assert list(NUMBERED.within("a").tensors(StackShape(2, 3, 5), (Projection.UP,))) == [
        "a.0.w3.weight",
        "a.1.w3.weight",
    ]
    assert PACKED[0].tensors(SHAPE, (Projection.UP,)) == {"gate_up_proj": (4, 6, 5)}
    assert PACKED[0].tensors(SHAPE, (Projection.DOWN,)) == {"down_proj": (4, 5, 3)}


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_projections_together_are_all_of_them_once(storage: Storage) -> None:
    assert [p for projections in storage.together for p in projections] == list(Projection)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate) * up


def clamped(gate: Tensor, up: Tensor) -> Tensor:
    """The activation of gpt-oss at its default settings."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


# Fused modules of transformers, their configurations and names of the sizes there.
MODULES: dict[str, tuple[Any, Any, tuple[str, str, str]]] = {
    "qwen3_moe": (
        Qwen3MoeExperts,
        Qwen3MoeConfig,
        ("num_experts", "moe_intermediate_size", "hidden_size"),
    ),
    "llama4": (
        Llama4TextExperts,
        Llama4TextConfig,
        ("num_local_experts", "intermediate_size", "hidden_size"),
    ),
    "gpt_oss": (
        GptOssExperts,
        GptOssConfig,
        ("num_local_experts", "intermediate_size", "hidden_size"),
    ),
}


@pytest.mark.parametrize(
    ("name", "activation", "interleaved", "transposed"),
    [
        ("qwen3_moe", swiglu, False, False),
        ("llama4", swiglu, False, True),
        ("gpt_oss", clamped, True, True),
    ],
)
@torch.no_grad()
def test_packed_experts_compute_what_the_module_of_transformers_does(
    name: str,
    activation: Callable[[Tensor, Tensor], Tensor],
    interleaved: bool,
    transposed: bool,
    tmp_path: Path,
) -> None:
    module_class, config_class, sizes = MODULES[name]
    module = module_class(config_class(**dict(zip(sizes, SHAPE, strict=True))))
    generator = torch.Generator().manual_seed(1)
    for path, parameter in module.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if path.endswith("bias"):
            parameter.zero_()
    storage = Packed("gate_up_proj", "down_proj", interleaved=interleaved, transposed=transposed)
    weights = {n: p.detach() for n, p in module.named_parameters() if not n.endswith("bias")}
    assert {n: tuple(tensor.shape) for n, tensor in weights.items()} == storage.tensors(SHAPE)
    checkpoint = saved(weights, tmp_path)
    x_EI = torch.randn(SHAPE.experts, SHAPE.hidden, generator=generator)
    if name == "llama4":  # its tokens come sorted by expert
        expected_EI = module(x_EI)
    else:
        every_E1 = torch.arange(SHAPE.experts)[:, None]
        expected_EI = module(x_EI, every_E1, torch.ones(SHAPE.experts, 1))
    for expert in range(SHAPE.experts):
        one = range(expert, expert + 1)
        gate_HI, up_HI, down_HI = (
            read_stack(storage, checkpoint, p, one, torch.empty(SHAPE))[0] for p in Projection
        )
        found_I = activation(x_EI[expert] @ gate_HI.T, x_EI[expert] @ up_HI.T) @ down_HI
        torch.testing.assert_close(found_I, expected_EI[expert], rtol=1e-4, atol=1e-4)

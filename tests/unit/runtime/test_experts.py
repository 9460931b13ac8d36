from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts

from tests.expert_cases import SWIGLU
from tuckerize.domain import Projection
from tuckerize.errors import CheckpointError
from tuckerize.names import TensorKind, TensorName
from tuckerize.runtime.dense import ExpertWeights, dense_output
from tuckerize.runtime.experts import TuckerExperts, TuckerStack
from tuckerize.runtime.grouped import assign

E, H, I = 4, 6, 10  # noqa: E741 the sizes of a group's stacks
FULL = (E, H, I)
SMALL = (2, 3, 4)
RANKS = [tuple(sizes) for sizes in itertools.product(*zip(FULL, SMALL, strict=True))]


@dataclass
class Layer:
    """Random Tucker groups, and the dense weights of every expert in stack orientation."""

    groups: list[dict[TensorName, Tensor]]
    dense: list[list[Tensor]]

    def matrices(self, expert: int) -> ExpertWeights:
        gate, up, down = self.dense[expert]
        return ExpertWeights(gate, up, down.T)


def make_layer(
    ranks: list[tuple[int, ...]] | tuple[int, ...], *, groups: int = 1, shared: bool = False
) -> Layer:
    """A layer of float64 groups; `ranks` is one rank or one for each projection."""
    by_projection = ranks if isinstance(ranks, list) else [ranks] * 3
    generator = torch.Generator().manual_seed(3)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64) / math.sqrt(sizes[-1])

    layer = Layer([], [])
    for _ in range(groups):
        tensors: dict[TensorName, Tensor] = {}
        stacks = []
        U_shared = random(I, by_projection[0][2])
        for projection, (r_E, r_H, r_I) in zip(Projection, by_projection, strict=True):
            core = random(r_E, r_H, r_I)
            U_E, U_H, U_I = random(E, r_E), random(H, r_H), random(I, r_I)
            tensors[TensorName(projection, TensorKind.CORE)] = core
            if shared and projection != Projection.DOWN and r_I < I:
                U_I = U_shared
                tensors[TensorName("gate_up_proj", TensorKind.U_I)] = U_I
            elif r_I < I:
                tensors[TensorName(projection, TensorKind.U_I)] = U_I
            if r_E < E:
                tensors[TensorName(projection, TensorKind.U_E)] = U_E
            if r_H < H:
                tensors[TensorName(projection, TensorKind.U_H)] = U_H
            identity = torch.eye(64, dtype=torch.float64)
            stacks.append(
                torch.einsum(
                    "abc,ea,hb,ic->ehi",
                    core,
                    U_E if r_E < E else identity[:E, :E],
                    U_H if r_H < H else identity[:H, :H],
                    U_I if r_I < I else identity[:I, :I],
                )
            )
        layer.groups.append(tensors)
        layer.dense += [[stack[expert] for stack in stacks] for expert in range(E)]
    return layer


def naive_output(layer: Layer, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """Token by token, expert by expert, in float64."""
    rows = []
    for token, own, shares in zip(x.double(), experts.tolist(), weights.double(), strict=True):
        total = torch.zeros(I, dtype=torch.float64)
        for expert, share in zip(own, shares, strict=True):
            gate, up, down = layer.dense[expert]
            total += share * (down.T @ (functional.silu(gate @ token) * (up @ token)))
        rows.append(total)
    return torch.stack(rows) if rows else torch.zeros(0, I, dtype=torch.float64)


def make_tokens(count: int, experts: int, top_k: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(count, I, generator=generator, dtype=torch.float64)
    chosen = [torch.randperm(experts, generator=generator)[:top_k] for _ in range(count)]
    weights = torch.rand(count, top_k, generator=generator)
    empty = torch.zeros(0, top_k, dtype=torch.int64)
    return x, torch.stack(chosen) if chosen else empty, weights


@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_biases_are_those_of_linear_layers(ranks: tuple[int, ...]) -> None:
    """Against a token by token sum in float64, and the dense experts."""
    generator = torch.Generator().manual_seed(5)
    layer = make_layer(ranks)
    sizes = {Projection.GATE: H, Projection.UP: H, Projection.DOWN: I}
    biases = {
        p: torch.randn(E, size, generator=generator, dtype=torch.float64)
        for p, size in sizes.items()
    }
    x, experts, weights = make_tokens(7, E)
    named = {TensorName.bias(projection): bias for projection, bias in biases.items()}
    module = TuckerExperts([layer.groups[0] | named], group_size=E, activation=SWIGLU)
    expected = torch.zeros_like(x)
    for token, (own, shares) in enumerate(zip(experts.tolist(), weights.double(), strict=True)):
        for expert, share in zip(own, shares, strict=True):
            gate, up, down = layer.dense[expert]
            gate_b, up_b, down_b = (bias[expert] for bias in biases.values())
            neurons = functional.silu(gate @ x[token] + gate_b) * (up @ x[token] + up_b)
            expected[token] += share * (down.T @ neurons + down_b)
    torch.testing.assert_close(module(x, experts, weights), expected, rtol=1e-12, atol=1e-12)
    found = dense_output(
        x,
        experts,
        weights,
        expert_weights=layer.matrices,
        activation=SWIGLU,
        biases=[list(bias) for bias in biases.values()],
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def check(layer: Layer, x: Tensor, experts: Tensor, weights: Tensor) -> None:
    module = TuckerExperts(layer.groups, group_size=E, activation=SWIGLU)
    expected = naive_output(layer, x, experts, weights)
    torch.testing.assert_close(module(x, experts, weights), expected, rtol=1e-12, atol=1e-12)
    dense = dense_output(x, experts, weights, expert_weights=layer.matrices, activation=SWIGLU)
    torch.testing.assert_close(dense, expected, rtol=1e-12, atol=1e-12)
    assert not len(x) or expected.norm() > 1e-3


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rank", RANKS, ids=str)
def test_experts_of_any_rank_compute_the_expanded_layer(
    rank: tuple[int, ...], shared: bool
) -> None:
    check(make_layer(rank, shared=shared), *make_tokens(17, E))


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("rank", RANKS, ids=str)
def test_experts_of_several_groups_compute_the_expanded_layer(
    rank: tuple[int, ...], groups: int
) -> None:
    check(make_layer(rank, groups=groups), *make_tokens(17, E * groups))


def test_experts_of_projections_with_different_ranks_compute_the_expanded_layer() -> None:
    check(make_layer([(4, 6, 3), (2, 6, 10), (4, 5, 7)], groups=2), *make_tokens(17, 8))


def test_experts_with_a_shared_factor_of_several_groups_keep_them_apart() -> None:
    check(make_layer([(4, 6, 3), (4, 6, 3), (4, 6, 10)], groups=2, shared=True), *make_tokens(9, 8))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("count", [0, 1, 200])
def test_experts_of_any_number_of_tokens_compute_the_expanded_layer(
    count: int, groups: int
) -> None:
    check(make_layer(SMALL, groups=groups), *make_tokens(count, E * groups))


@pytest.mark.parametrize("expert", [0, 5, 7])
def test_experts_with_all_tokens_on_one_expert_compute_the_expanded_layer(expert: int) -> None:
    x, _, weights = make_tokens(12, 8)
    check(make_layer(SMALL, groups=2), x, torch.full((12, 1), expert), weights[:, :1])


@pytest.mark.parametrize("rank", [(4, 6, 10), (4, 6, 4), (2, 3, 4)], ids=str)
def test_experts_of_dense_weights_equal_those_of_transformers(rank: tuple[int, ...]) -> None:
    layer = make_layer(rank, groups=2)
    config = DeepseekV2Config(
        hidden_size=I, moe_intermediate_size=H, n_routed_experts=8, num_attention_heads=1
    )
    theirs = DeepseekV2Experts(config).double()  # type: ignore[no-untyped-call]
    theirs.gate_up_proj.data = torch.stack([torch.cat([g, u]) for g, u, _ in layer.dense])
    theirs.down_proj.data = torch.stack([down.T for _, _, down in layer.dense])
    x, experts, weights = make_tokens(23, 8)
    expected = theirs(x, experts, weights.double()).detach()
    module = TuckerExperts(layer.groups, group_size=E, activation=SWIGLU)
    torch.testing.assert_close(module(x, experts, weights), expected, rtol=1e-6, atol=1e-9)
    dense = dense_output(x, experts, weights, expert_weights=layer.matrices, activation=SWIGLU)
    torch.testing.assert_close(dense, expected, rtol=1e-6, atol=1e-9)


def test_experts_stored_in_bfloat16_compute_in_the_dtype_of_the_tokens() -> None:
    layer = make_layer(SMALL)
    rounded = [{n: t.bfloat16() for n, t in group.items()} for group in layer.groups]
    wide = [{n: t.double() for n, t in group.items()} for group in rounded]
    x, experts, weights = make_tokens(9, E)
    expected = TuckerExperts(wide, group_size=E, activation=SWIGLU)(x, experts, weights)
    output = TuckerExperts(rounded, group_size=E, activation=SWIGLU)(x.float(), experts, weights)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected.float(), rtol=1e-4, atol=1e-6)


def test_experts_have_the_state_dict_of_the_names_on_disk() -> None:
    layer = make_layer([(2, 6, 4), (4, 6, 4), (4, 3, 10)], groups=2, shared=True)
    module = TuckerExperts(layer.groups, group_size=E, activation=SWIGLU)
    expected = {f"group_{n}.{name}" for n, group in enumerate(layer.groups) for name in group}
    assert module.state_dict().keys() == expected


def test_stack_without_a_core_is_refused() -> None:
    stack = TuckerStack({TensorName("up_proj", TensorKind.U_H): torch.zeros(2, 1)})
    rows = assign(torch.zeros(1, 1, dtype=torch.int64), range(1))
    with pytest.raises(CheckpointError, match="a stack has no core"):
        stack.multiply(torch.zeros(1, 1), rows, transposed=False)


def test_dense_output_reads_each_expert_that_has_tokens_once() -> None:
    layer = make_layer(FULL)
    read: list[int] = []

    def matrices(expert: int) -> ExpertWeights:
        read.append(expert)
        return layer.matrices(expert)

    experts = torch.tensor([[3, 1], [1, 3], [3, 1]])
    x, _, weights = make_tokens(3, E, top_k=2)
    dense_output(x, experts, weights, expert_weights=matrices, activation=SWIGLU)
    assert read == [1, 3]


def uneven_layer() -> list[dict[TensorName, Tensor]]:
    """A group whose experts have different widths."""
    generator = torch.Generator().manual_seed(5)
    tensors = {
        TensorName.core(projection, expert): torch.randn(1 + expert, 4, generator=generator)
        for projection in Projection
        for expert in range(E)
    }
    for owner in ("gate_up_proj", "down_proj"):
        tensors[TensorName(owner, TensorKind.U_I)] = torch.randn(I, 4, generator=generator)
    return [tensors]


def test_every_parameter_gets_a_gradient_whichever_experts_have_tokens() -> None:
    """Data-parallel training waits for the gradients of all of them."""
    module = TuckerExperts(uneven_layer(), group_size=E, activation=SWIGLU).requires_grad_()
    x, weights = torch.randn(2, I), torch.rand(2, 1)
    module(x, torch.tensor([[1], [1]]), weights).sum().backward()
    gradients = {name: value.grad for name, value in module.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    idle = gradients["group_0.gate_proj.core.0"]
    assert idle is not None
    assert not idle.any()


def even_layer() -> list[dict[TensorName, Tensor]]:
    """A group whose experts are of sizes that a grouped GEMM takes."""
    tensors = {TensorName.core(projection): torch.randn(E, 8, 4) for projection in Projection}
    for owner in ("gate_up_proj", "down_proj"):
        tensors[TensorName(owner, TensorKind.U_I)] = torch.randn(I, 4)
    return [tensors]


def right_operands(module: TuckerExperts) -> set[str]:
    """Names of the matrices that rows are multiplied by as they are, not transposed."""
    names = [
        TensorName.parse(name) for name, own in module.named_parameters() if min(own.shape) > 1
    ]
    mixed = {name.owner for name in names if name.kind == TensorKind.U_E}
    return {
        str(name)
        for name in names
        if (name.kind == TensorKind.U_I and name.owner != Projection.DOWN)
        or (name.kind == TensorKind.U_H and name.owner == Projection.DOWN)
        or (name.kind == TensorKind.CORE and name.owner in {Projection.DOWN} - mixed)
    }


@pytest.mark.parametrize("layer", [lambda: make_layer(SMALL).groups, uneven_layer, even_layer])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("born", ["normally", "in inference mode"])
def test_layout_for_a_cpu_is_seen_by_nobody(
    layer: Callable[[], list[dict[TensorName, Tensor]]], dtype: torch.dtype, born: str
) -> None:
    """What is stored stays as it was given, and trains, after products in 16 bits."""
    groups = [{name: own.to(dtype) for name, own in group.items()} for group in layer()]
    x, experts, weights = make_tokens(9, E)
    x, weights = x.to(dtype), weights.to(dtype)
    with torch.inference_mode(mode=born == "in inference mode"):
        module = TuckerExperts(
            [{name: own.clone() for name, own in group.items()} for group in groups],
            group_size=E,
            activation=SWIGLU,
        )
    wide = [{name: own.double() for name, own in group.items()} for group in groups]
    exact = TuckerExperts(wide, group_size=E, activation=SWIGLU)
    expected = exact(x.double(), experts, weights.double()).to(dtype)
    for _ in range(2):
        with torch.inference_mode():
            output = module(x, experts, weights)
        torch.testing.assert_close(output, expected, rtol=0.05, atol=0.05 * float(expected.max()))
        right = {name for name, own in module.named_parameters() if not own.is_contiguous()}
        assert right == right_operands(module)
        stored = module.state_dict()
        assert all(value.is_contiguous() for value in stored.values())
        given = {
            f"group_{n}.{name}": own
            for n, group in enumerate(groups)
            for name, own in group.items()
        }
        torch.testing.assert_close(stored, given, rtol=0, atol=0, check_stride=True)
    if born == "in inference mode":  # such tensors have no gradients
        return
    trained = copy.deepcopy(module).requires_grad_()
    trained(x, experts, weights).sum().backward()
    assert all(own.grad is not None for own in trained.parameters())


@pytest.mark.parametrize("layer", [uneven_layer, even_layer])
def test_torch_compile_gives_the_same_without_compiling_again_for_every_batch(
    layer: Callable[[], list[dict[TensorName, Tensor]]],
) -> None:
    module = TuckerExperts(layer(), group_size=E, activation=SWIGLU)
    torch.compiler.reset()
    compiled = torch.compile(module, backend="eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for count in range(2, 14):
            x, experts, weights = make_tokens(count, E)
            x = x.float()
            expected = module(x, experts, weights)
            torch.testing.assert_close(compiled(x, experts, weights), expected)

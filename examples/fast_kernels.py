"""Faster kernels for training a small Mixture-of-Experts model on the CPU.

They replace the library's own through its registries, are checked against them before use, and
are needed for training only: the saved model runs on the library's.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, scaled_dot_product_attention, silu
from transformers import DeepseekV2ForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ROW_BLOCK = 64
"""Every expert's rows are padded to a multiple of this, to keep matrix shapes regular."""


class Context(Protocol):
    """What PyTorch hands to the two directions of a function."""

    saved_tensors: tuple[Tensor, ...]
    slots: torch.Size

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keeps tensors for the way back."""


class Experts(Protocol):
    """The library's module of one layer's routed experts."""

    num_experts: int
    gate_up_proj: Tensor
    down_proj: Tensor


class Gather(torch.autograd.Function):
    """Copies each token's row to the slots of its experts; the way back is a gather as well."""

    @staticmethod
    def forward(ctx: Context, rows: Tensor, slot_token: Tensor, pair_slot: Tensor) -> Tensor:
        """Takes row ``slot_token[s]`` for slot ``s``; ``pair_slot`` lists each token's slots."""
        ctx.save_for_backward(pair_slot)
        return rows.index_select(0, slot_token)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None]:
        """Sums the gradients of a token's slots, without the slow scattered addition."""
        (pair_slot,) = ctx.saved_tensors
        return grad[pair_slot].sum(dim=1), None, None


class Return(torch.autograd.Function):
    """Reads the slots' results back in the tokens' order; every slot is read at most once."""

    @staticmethod
    def forward(ctx: Context, slots: Tensor, pair_slot: Tensor) -> Tensor:
        """Gives the results as tokens x experts per token x width."""
        ctx.save_for_backward(pair_slot)
        ctx.slots = slots.shape
        return slots[pair_slot]

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None]:
        """Writes each pair's gradient to its slot; padding slots get none."""
        (pair_slot,) = ctx.saved_tensors
        result = grad.new_zeros(ctx.slots)
        result[pair_slot.reshape(-1)] = grad.reshape(-1, grad.shape[-1])
        return result, None


def sorted_experts(self: Experts, rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Computes the routed experts on tokens sorted by expert: the same result, sooner.

    The stacked weights are split by one ``unbind``: slicing them one expert at a time would have
    the backward pass fill a zero tensor of the whole stack for every expert.
    """
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=self.num_experts)
    padded = (counts + ROW_BLOCK - 1) // ROW_BLOCK * ROW_BLOCK
    shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
    slots = torch.arange(len(flat)) + shift[flat[order]]
    slot_token = torch.zeros(int(padded.sum()), dtype=torch.long)
    slot_token[slots] = order // index.shape[-1]
    pair_slot = torch.empty_like(order)
    pair_slot[order] = slots
    pair_slot = pair_slot.view_as(index)
    gate_up, down = self.gate_up_proj.unbind(0), self.down_proj.unbind(0)
    parts = []
    gathered: Tensor = Gather.apply(rows, slot_token, pair_slot)  # type: ignore[no-untyped-call]
    for expert, block in enumerate(torch.split(gathered, padded.tolist())):
        gate, up = linear(block, gate_up[expert]).chunk(2, dim=-1)
        parts.append(linear(silu(gate) * up, down[expert]))
    results: Tensor = Return.apply(torch.cat(parts), pair_slot)  # type: ignore[no-untyped-call]
    return (results * weights.unsqueeze(-1)).sum(dim=1)


def padded_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: None,
    *,
    scaling: float,
    **_options: object,
) -> tuple[Tensor, None]:
    """Causal attention with the values padded to the keys' width, which the CPU's kernel needs."""
    wide = pad(value, (0, key.shape[-1] - value.shape[-1]))
    out = scaled_dot_product_attention(query, key, wide, is_causal=True, scale=scaling)
    return out[..., : value.shape[-1]].transpose(1, 2), None


def use_fast_kernels(model: DeepseekV2ForCausalLM) -> None:
    """Switches to the training kernels after checking them against the library's own."""
    ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts)
    ALL_ATTENTION_FUNCTIONS.register("padded", padded_attention)
    # Token 0 pads: its row is zero, so every normalisation would multiply its gradient by 1000.
    tokens = (torch.arange(3 * 64) % (model.config.vocab_size - 1) + 1).view(3, 64)
    results = []
    for experts, attention in (("eager", "eager"), ("sorted", "padded")):
        model.set_experts_implementation(experts)
        model.set_attn_implementation(attention)
        logits = model(input_ids=tokens, use_cache=False).logits
        gradients = torch.autograd.grad(logits.square().mean(), list(model.parameters()))
        results.append([logits.detach(), *gradients])
    for expected, actual in zip(*results, strict=True):
        largest = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * largest)

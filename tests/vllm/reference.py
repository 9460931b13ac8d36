"""Products in place of the quantised kernels that the engine lacks on this processor.

vLLM's own methods choose, create, load and check the weights. What they hand to a kernel is
multiplied here, expert by expert, with the values that codes and scales stand for.
"""

# ruff: noqa: ANN401  theirs have no types that are known here

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt8
from vllm.model_executor.layers.fused_moe.oracle import fp8, int8, int_wna16
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16,
)


def values(codes_EOK: Tensor, scales_EOG: Tensor) -> Tensor:
    """Values of codes: of 4 or 3 bits in groups of 32, the first in the lowest bits, or of 8."""
    if codes_EOK.dtype in (torch.int32, torch.uint8):
        read = codes_EOK.contiguous().view(torch.uint8)
        bits = 8 * read.shape[-1] // (32 * scales_EOG.shape[-1])
        bools = np.unpackbits(read.numpy(), axis=-1, bitorder="little")
        codes = bools.reshape(*bools.shape[:-1], -1, bits) @ (1 << np.arange(bits))
        codes_EOK = torch.from_numpy(codes) - 2 ** (bits - 1)
    group = codes_EOK.shape[-1] // scales_EOG.shape[-1]
    return codes_EOK.float() * scales_EOG.float().repeat_interleave(group, -1)


def routed_output(
    x_TI: Tensor, gate_up_EOI: Tensor, down_EIH: Tensor, weights_Tk: Tensor, experts_Tk: Tensor
) -> Tensor:
    """Weighted sums over experts, of those that the worker has; others are negative."""
    output_TI = torch.zeros_like(x_TI)
    for expert, (gate_up_OI, down_IH) in enumerate(zip(gate_up_EOI, down_EIH, strict=True)):
        tokens, slots = (experts_Tk == expert).nonzero(as_tuple=True)
        gate, up = (x_TI[tokens] @ gate_up_OI.to(x_TI.dtype).T).chunk(2, -1)
        result = (functional.silu(gate) * up) @ down_IH.to(x_TI.dtype).T
        output_TI.index_add_(0, tokens, weights_Tk[tokens, slots, None].to(x_TI.dtype) * result)
    return output_TI


class ReferenceExperts(CPUExpertsInt8):  # type: ignore[misc]
    """Quantised experts, with the limits of sizes of vLLM's int8 kernel for CPUs."""

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_quant_scheme(*_: object) -> bool:
        return True

    def process_weights_after_loading(self, layer: Any) -> None:
        """Leave codes as they were loaded."""

    def moe_problem_size(
        self,
        a1: Tensor,
        w1: Tensor,
        w2: Tensor,  # noqa: ARG002
        topk_ids: Tensor,
    ) -> tuple[int, int, int, int, int]:
        """Sizes, which packed codes do not tell."""
        return len(w1), len(a1), w1.shape[1], a1.shape[1], topk_ids.shape[1]

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *_: object,
        **__: object,
    ) -> None:
        """Write the routed output."""
        gate_up, down = values(w1, self.w1_scale), values(w2, self.w2_scale)
        output.copy_(routed_output(hidden_states, gate_up, down, topk_weights, topk_ids))


def offer() -> None:
    """Give vLLM a kernel for quantised experts on a CPU."""
    for oracle, backend in (
        (int8, int8.Int8MoeBackend.CPU),
        (fp8, fp8.Fp8MoeBackend.TRITON),
        (int_wna16, int_wna16.WNA16MoEBackend.TRITON),  # its format is that of the checkpoint
    ):
        oracle._get_priority_backends = lambda *_, backend=backend: [backend]
        oracle.backend_to_kernel_cls = lambda _: [ReferenceExperts]
    int_wna16.TritonWNA16Experts = ReferenceExperts  # one of those that it allows
    # That backend has no 3 bits; of the number of bits nothing but scales follows.
    describe = compressed_tensors_moe_wna16.make_wna16_moe_quant_config
    compressed_tensors_moe_wna16.make_wna16_moe_quant_config = lambda *positional, **named: (
        describe(*positional, **{**named, "num_bits": max(4, named["num_bits"])})
    )

"""Quantised cores in training: codes are float32 parameters that every forward rounds.

The gradient of a code is that of its value before rounding (straight-through estimator).

Source:
    Bengio et al. 2013, Estimating or Propagating Gradients Through Stochastic Neurons.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tuckerize.domain import CoreType
from tuckerize.format.cores import CODES, quantised_matrices
from tuckerize.linalg.packing import pack
from tuckerize.linalg.quantise import QuantisedMatrices, code_dtype, nearest_codes
from tuckerize.names import CorePart
from tuckerize.runtime.quantised import QuantisedCore


class TrainedCore(QuantisedCore):
    """A quantised core whose codes and scales are float32 parameters, named as what they become.

    Args:
        parts: Its tensors as stored.
    """

    def __init__(self, parts: Mapping[CorePart, Tensor]) -> None:
        found = quantised_matrices(parts)
        codes = CODES[found.core_type]
        super().__init__({codes: found.codes.float(), CorePart.SCALES: found.scales.float()})
        self.core_type = found.core_type
        self.stored_dtype = found.scales.dtype

    def matrices(self, dtype: torch.dtype, expert: int | None = None) -> Tensor:
        """Matrices that map inputs to outputs, of the values that are stored.

        Args:
            dtype: Type of the result.
            expert: Which matrix of the core; all by default.
        """
        codes: Tensor = self.get_parameter(CODES[self.core_type])
        scales: Tensor = self.weight_scale
        if expert is not None:
            codes, scales = codes[expert], scales[expert]
        codes = _straight_through(codes, rounded(codes, self.core_type))
        scales = _straight_through(scales, scales.to(self.stored_dtype).float())
        return QuantisedMatrices(codes, scales, self.core_type).dequantised().to(dtype).mT


def train_rounded(experts: nn.Module) -> None:
    """Replace the quantised cores of a layer by such that can be trained."""
    for module in [*experts.modules()]:
        for name, core in [*module.named_children()]:
            if type(core) is QuantisedCore:
                setattr(module, name, TrainedCore(core.parts()))


def rounded(codes: Tensor, core_type: CoreType) -> Tensor:
    """Codes as they are stored, in their own type."""
    return nearest_codes(codes.detach(), core_type)


def encode(codes: Tensor, core_type: CoreType) -> Tensor:
    """Tensor that is stored of trained codes, shape (..., O, K) or as words."""
    whole = rounded(codes, core_type).to(code_dtype(core_type))
    return whole if core_type.word_codes == 1 else pack(whole, core_type)


def _straight_through(value: Tensor, stored: Tensor) -> Tensor:
    return value + (stored - value).detach()

"""Attention of layers whose values are narrower than their keys, by torch's fused kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class FusedAttention(TorchFunctionMode):
    """Within it attention on the CPU is fused for latent attention, too (DeepSeek-V2).

    torch's kernel takes values as wide as keys alone; others make the matrix of all scores, which
    takes 1.5 to 3 times as long. So narrower values get columns of zeros while it runs. Of this
    thread alone.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Call a function of torch, attention with wider values."""
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs or {})
        return _attend(*args, **kwargs or {})


def _attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
    width, missing = value.shape[-1], key.shape[-1] - value.shape[-1]
    if missing > 0 and value.device.type == "cpu":
        value = functional.pad(value, (0, missing))
    output: Tensor = functional.scaled_dot_product_attention(query, key, value, *args, **kwargs)
    return output[..., :width]

"""Where a row could be served today: which platform has kernels for its matrices and its shape."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]

WEIGHTS: dict[str, dict[int, tuple[int | None, ...]]] = {
    "Ascend": {8: (None,), 4: (32, 128)},
    "CUDA": {8: (None, 32, 128), 4: (32, 64, 128), 3: (32, 64, 128), 2: (32, 64, 128)},
    "CPU": {8: (None, 32, 128), 4: (32, 64, 128)},
}
"""Bits of a weight that a platform's fused-MoE kernels take, and the groups of inputs.

Ascend: the quantisation types of vllm-ascend, W8A8 and W4A16, symmetric. CUDA: vLLM's WNA16 and
Humming kernels; 5, 6 and 7 bits are in review there. CPU: int8 and int4 products of torch and vLLM
(llama.cpp has formats of 2 to 6 bits of its own, which are not measured here).
"""

_EQUAL_WIDTHS = "neuron elimination, equal widths"
_STOCK = ("dense", "REAP", _EQUAL_WIDTHS)
"""Structures that leave a stock checkpoint: other numbers in config.json, nothing else."""

_NEURONS = {"coarse": 320, "fine": 64, "large": 96}
"""Neurons of an expert of the dense models."""


def is_servable(row: Row, platform: str) -> bool:
    """Whether engines of a platform have kernels for a row.

    Our own are W4 and W3 in groups of 32 or 128 and W8: the targets any-engine and fused-kernels
    where engines have the weights, free, whose experts differ in width, on CPU and CUDA with our
    own products. A size (`--bits 6`) is spent on W8 and W4 where engines are to serve it.
    """
    if row["structure"] == "tuckerize":
        if row["target"] == "free":
            return platform != "Ascend"
        encoding: str = row["encoding"].split()[0]
        return encoding.startswith("-") or int(encoding[1]) in WEIGHTS[platform]
    if row["structure"] not in _STOCK:  # experts of different widths: no engine
        return False
    if is_trellis(row):
        return False
    bits, group, zero = encoding_of(row)
    if row["structure"] == _EQUAL_WIDTHS and group and _width(row) % group:
        return False  # kernels and quantisers refuse widths that groups do not divide
    takes = WEIGHTS[platform].get(bits, ())
    return group in takes and not (zero and platform == "Ascend")


def _width(row: Row) -> int:
    """Neurons that experts of equal widths keep; multiply-adds are proportional to them."""
    width: int = round(row["multiply_adds"] * _NEURONS[row["model"]])
    return width


def is_trellis(row: Row) -> bool:
    """Whether a row is of trellis codes: exllamav3 has kernels for them (CUDA), none of ours."""
    return "trellis" in str(row["encoding"])


def encoding_of(row: Row) -> tuple[int, int | None, bool]:
    """Bits, group and zero points of a competitor's row, from its text."""
    words = row["encoding"].split(", ")
    bits = int(words[0].split()[0])
    group = None if words[1] == "channel" else int(words[1].removeprefix("g"))
    return bits, group, "zero points" in words

"""Our own rows: `tuckerize decompose` and `reconstruct`, and what the result costs per token."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.layer import Compressed, Layer, Stacks
from benchmarks.quality.models import MoeModel
from benchmarks.quality.quantised import Costs
from tuckerize import DecomposeRequest, ReconstructRequest, decompose, reconstruct
from tuckerize.domain import Mode, Projection
from tuckerize.format.manifest import TuckerManifest, read_tucker_manifest

BITS = "--bits "
"""Begins an encoding that is a size: how it is spent is the program's choice."""
RANDOM = " --random-share "
"""Ends an encoding with the share of random tokens, where that is not the program's choice."""


def request(
    folder: Path, text: Path, tokens: int, *, keep: float, encoding: str | None, target: str
) -> DecomposeRequest:
    """What `tuckerize decompose` is asked for.

    Args:
        folder: The model.
        text: Text to calibrate with.
        tokens: Its tokens.
        keep: Kept share of the parameters; of no meaning where the encoding is a size.
        encoding: Encoding of the cores, or a size: `--bits 3.1`; see also `RANDOM`.
        target: Engines to serve it.
    """
    settings: dict[str, Any] = {"texts": [str(text)], "tokens": tokens, "target": target}
    if encoding is not None and RANDOM in encoding:
        encoding, share = encoding.split(RANDOM)
        settings["random_share"] = float(share)
    asked = DecomposeRequest(model=folder, calibration=settings)
    if encoding is not None and encoding.startswith(BITS):
        return replace(asked, bits=float(encoding.removeprefix(BITS)))
    return replace(asked, keep=keep, quantize=encoding)


def decomposed(asked: DecomposeRequest) -> tuple[MoeModel, float, TuckerManifest]:
    """The model as `tuckerize decompose` leaves it, its bits per weight, and its manifest."""
    with tempfile.TemporaryDirectory(prefix="quality-") as temporary:
        small, dense = Path(temporary, "small"), Path(temporary, "dense")
        decompose(replace(asked, output=small))
        reconstruct(ReconstructRequest(folder=small, output=dense, dequantize=True))
        manifest = read_tucker_manifest(small)
        return MoeModel(dense), manifest.after.bits_per_weight(manifest.before), manifest


def unrounded(asked: DecomposeRequest) -> tuple[list[Compressed], TuckerManifest]:
    """The layers as `tuckerize decompose` leaves them in 16 bits, and the manifest.

    Raises:
        ValueError: A layer has other factors than one U_I of gate and up.
    """
    model, _, manifest = decomposed(asked)
    found = []
    for index, stacks in zip(manifest.layers, model.stacks, strict=True):
        hidden = stacks[0].shape[-1]
        (ranks,) = manifest.ranks(index)
        gate, up, down = (ranks[p][Mode.HIDDEN] for p in Projection)
        if gate != up or down < hidden:
            raise ValueError(f"layer {index} has a U_I of gate, of up or of down alone")
        basis_IR = _basis(stacks, gate) if gate < hidden else None
        found.append(Compressed(stacks, stacks, basis_IR=basis_IR))
    return found, manifest


def _basis(stacks: Stacks, rank: int) -> Tensor:
    """Orthonormal basis of the inputs that gate and up read, (I, R)."""
    gate_up_NI = torch.cat(stacks[:2]).flatten(0, 1)
    right_RI: Tensor = torch.linalg.svd(gate_up_NI, full_matrices=False).Vh[:rank]
    return right_RI.T.contiguous()


def costs(layers: Sequence[Layer], manifest: TuckerManifest) -> Costs:
    """Multiply-adds and traffic of the cores and of their U_I, by how often experts are used."""
    products, dense_products, to_sum, to_send = 0.0, 0.0, 0.0, 0.0
    for index, layer in zip(manifest.layers, layers, strict=True):
        _, neurons, hidden = layer.shape
        tokens, top_k = layer.experts_Tk.shape
        uses_E = torch.bincount(layer.experts_Tk.flatten(), minlength=layer.shape[0]) / tokens
        ranks = manifest.ranks(index)[0]
        widths_E = torch.tensor(manifest.widths(index, 0))
        latent = {p: ranks[p][Mode.HIDDEN] for p in Projection}
        width = float((uses_E * widths_E).sum())
        products += width * sum(latent.values())
        for projection in (Projection.GATE, Projection.DOWN):  # gate and up share theirs
            products += hidden * latent[projection] * (latent[projection] < hidden)
        dense_products += top_k * 3 * neurons * hidden
        to_sum += latent[Projection.DOWN] / hidden
        to_send += (latent[Projection.GATE] + latent[Projection.DOWN]) / (2 * hidden)
    count = len(layers)
    return Costs(products / dense_products, to_sum / count, to_send / count)

"""Make the latent space of a LatentMoE smaller: the result is an ordinary checkpoint.

Between such a layer and its experts are two linear layers, into a latent space and out of it
(Nemotron-H). An oblique projection of that space, of a rank below its size, is folded into them and
into the experts on its other side; the configuration gets the new size. Of a model whose experts
read the hidden states themselves the two layers are the identity, and are written anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tuckerize.calibration.calibration_pass import CalibrationPass
from tuckerize.calibration.text import fingerprint
from tuckerize.checkpoint.files import describe_file, read_json_object, write_json
from tuckerize.checkpoint.hub import resolve_model
from tuckerize.checkpoint.other_files import copy_other_files
from tuckerize.checkpoint.output import RECONSTRUCTED, OutputFolder, refuse_overlap
from tuckerize.checkpoint.reader import WeightFile
from tuckerize.checkpoint.space import require_space
from tuckerize.checkpoint.weight_set import CONFIG, INDEX
from tuckerize.checkpoint.writer import write_dense, write_index, write_tensors
from tuckerize.domain import Device, Projection
from tuckerize.errors import CheckpointError, UsageError, located
from tuckerize.format.manifest import checksum
from tuckerize.linalg.hooi import check_finite
from tuckerize.linalg.oblique import oblique_projection
from tuckerize.moe.family import Latent
from tuckerize.moe.source import SourceModel
from tuckerize.parallel.backends import choose_device
from tuckerize.parallel.memory import require_memory
from tuckerize.planning.plan import output_fingerprint
from tuckerize.progress import Progress, SilentProgress
from tuckerize.recipe import Recipe
from tuckerize.recipe_files import Texts
from tuckerize.recipe_reader import recipe_of_options
from tuckerize.report.results import FoldedLayer, FoldReport
from tuckerize.version import __version__

# Grouped GEMMs need rows of multiples of 16 bytes.
_ALIGNED = 8
_STORED = (Projection.UP, Projection.DOWN)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldRequest:
    """A smaller latent space.

    Attributes:
        model: Folder, Hugging Face id in the local cache, or short name of the source.
        output: The new folder.
        keep: Kept share of the latent space, in (0, 1], or a percentage: 0.75 or "75%". Its size is
            rounded down to a multiple of 8.
        calibration: Text or JSONL file, or several, or the `calibration` keys of a recipe. Without
            it the weights alone decide.
        device: Where a calibrated model runs: auto, npu, cuda or cpu.
        overwrite: Begin anew: replace an earlier result, finished or not.
    """

    model: str | Path
    output: str | Path
    keep: float | str
    calibration: Texts | dict[str, Any] | None = None
    device: str = Device.AUTO
    overwrite: bool = False

    def to_recipe(self) -> Recipe:
        """The share and the calibration as a recipe has them.

        Raises:
            RecipeError: A value is not possible.
        """
        how = {"calibration": self.calibration}
        return recipe_of_options(None, sizes={"keep": self.keep}, where={}, how=how)


class Moments(NamedTuple):
    """Second moments, float64, of the vectors that the experts of a layer read and write."""

    inputs_NN: Tensor
    outputs_NN: Tensor


def fold(request: FoldRequest, progress: Progress | None = None) -> FoldReport:
    """Write a model whose experts compute in a smaller latent space, in the type of its experts.

    Args:
        request: The model and the share of its latent space.
        progress: Shows how far the work is.

    Returns:
        Sizes, and the relative residuals at both ends of the experts.

    Raises:
        TuckerizeError: The request cannot be carried out; the message says why.

    Example:
        >>> request = FoldRequest(model="Nemotron-3-Super", output="OUT", keep=0.75)
        >>> fold(request).latent_size  # doctest: +SKIP
    """
    progress, recipe = progress or SilentProgress(), request.to_recipe()
    source, output = SourceModel.open(resolve_model(str(request.model))), Path(request.output)
    _latent_of(source)
    refuse_overlap(output, source.checkpoint.folder)
    size = _size(source, recipe.rules[0].keep or 1.0)
    calibration = None
    if recipe.calibration is not None:
        device = choose_device(Device.parse(request.device))
        calibration = CalibrationPass.open(source, recipe, device)
    _require_memory(source, is_run=calibration is not None)
    text = fingerprint(calibration.windows_SL) if calibration else ""
    contents = output_fingerprint(source, recipe, text)
    folder = OutputFolder(output, RECONSTRUCTED)
    with folder.claim(contents, overwrite=request.overwrite, read=progress.advance):
        if folder.is_finished:  # by a run that was killed at its very end
            folder.tidy()
        else:
            require_space(output, source.size.total_parameters * source.dtype.itemsize)
            record = {"tuckerize_version": __version__, "recipe": contents["recipe"]}
            record |= _write_all(source, folder, size, calibration, progress)
            folder.finish(record | {"checksum": checksum(record)})
    written = read_json_object(output / RECONSTRUCTED)
    return FoldReport(
        output=str(output),
        layers=tuple(FoldedLayer(**layer) for layer in written["layers"]),
        latent_before=source.moe.shape.hidden,
        latent_size=size,
        before=source.size,
        after=SourceModel.open(output).size,
        notes=() if calibration is None else calibration.notes,
    )


def _latent_of(source: SourceModel) -> Latent:
    """The latent space of the model's family.

    Raises:
        UsageError: It has none.
        CheckpointError: There are experts of layers that config.json does not count.
    """
    family, moe = source.moe.family, source.moe
    if family.row.latent is None:
        raise UsageError(
            f"experts of {family.model_type} do not compute in a latent space of their own",
            hint="make them smaller with 'tuckerize decompose'",
        )
    known = {n for layer in (*moe.layers, *moe.further) for n in source.routed_tensors(layer)}
    experts = f".{family.row.experts}."
    others = [n for n in source.checkpoint.tensors if experts in n and n not in known]
    if others:
        raise CheckpointError(
            f"config.json does not count the layer of {others[0]}, which would keep the old latent "
            "size",
            hint="set num_hidden_layers in config.json to the number of layers before mtp.layers, "
            "or remove the layer from the files",
        )
    return family.row.latent


def _require_memory(source: SourceModel, *, is_run: bool) -> None:
    """Refuse what cannot fit: the result of a layer, and its experts in float32 where they run."""
    needed = len(_STORED) * source.dtype.itemsize
    if is_run:
        needed += len(Projection) * torch.float32.itemsize
    what = "the experts of a layer, before and after"
    require_memory(needed * source.moe.shape.parameters, what, "end other programs")


def _size(source: SourceModel, keep: float) -> int:
    """The new size of the latent space."""
    before = source.moe.shape.hidden
    if keep == 1:
        return before
    return min(before, max(_ALIGNED, int(keep * before) // _ALIGNED * _ALIGNED))


def _write_all(
    source: SourceModel,
    folder: OutputFolder,
    size: int,
    calibration: CalibrationPass | None,
    progress: Progress,
) -> dict[str, Any]:
    """Write all but the record, and return its files; weight files that are there stay."""
    output, checkpoint = folder.folder, source.checkpoint
    layers = (*source.moe.layers, *source.moe.further)
    changed = {
        name
        for layer in layers
        for name in (*source.routed_tensors(layer), *_around(source, layer))
    }
    kept = {
        file: [name for name in checkpoint.names_in(file) if name not in changed]
        for file in checkpoint.files
    }
    copies = [file for file, names in kept.items() if names]
    count = len(copies) + len(layers)
    written = [output / f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    progress.start(count if calibration is None else len(copies) + calibration.model.layers)
    for path, file in zip(written, copies, strict=False):
        if folder.record(path.stem) is None:
            copied = write_dense(path, checkpoint, file, kept[file], source.moe.dtype)
            folder.write_record(path.stem, copied.model_dump(), [copied])
        progress.advance(1, file)
    paths = dict(zip(layers, written[len(copies) :], strict=True))
    for layer, moments in _moments(source, calibration, progress):
        path = paths[layer]
        if folder.record(path.stem) is None:
            with located(f"layer {layer}"):
                tensors, errors = _fold_layer(source, layer, size, moments)
            made = write_tensors(path, tensors)
            folder.write_record(path.stem, made.model_dump() | {"errors": errors}, [made])
    progress.close()
    records = [folder.finished_record(path.stem) for path in written]
    others = copy_other_files(checkpoint.folder, output)
    write_json(output / CONFIG, _config(source, size))
    write_index(output, [WeightFile.open(path) for path in written])
    small = sorted({*others, CONFIG, INDEX})
    return {
        "layers": [
            {"layer": layer, **record.pop("errors")}
            for layer, record in zip(layers, records[len(copies) :], strict=True)
        ],
        "files": records,
        "other_files": [describe_file(output / name, name=name).model_dump() for name in small],
    }


def _around(source: SourceModel, layer: int) -> tuple[str, str, str]:
    """Names of the weight and bias into the latent space of a layer, and of the weight out of it.

    The bias out of it is that of the sum, and stays as it is.
    """
    latent, family = _latent_of(source), source.moe.family
    into, out_of = family.name(layer, latent.into), family.name(layer, latent.out_of)
    return f"{into}.weight", f"{into}.bias", f"{out_of}.weight"


def _moments(
    source: SourceModel, calibration: CalibrationPass | None, progress: Progress
) -> Iterator[tuple[int, Moments | None]]:
    """All layers with routed experts, and their moments on the text; None where it tells nothing.

    Routing weights count as they do in a calibrated decomposition: relative to the norms of the
    hidden states. Layers that predict further tokens are folded by their weights alone.
    """
    if calibration is None:
        for layer in source.moe.layers:
            yield layer, None
            progress.advance(1, f"layer {layer}")
    else:
        states = calibration.embed()
        for layer in range(calibration.model.layers):
            if layer in source.moe.layers:
                module = calibration.dense(layer, calibration.groups(layer))
                found = calibration.capture(layer, states, len(states), module)
                weights_T1 = found.tokens.weights_Tk.double().square().sum(1, keepdim=True).sqrt()
                inputs_TN = weights_T1 * found.tokens.x_TI.double()
                outputs_TN, states = found.output_TI.double(), found.after
                yield layer, Moments(inputs_TN.T @ inputs_TN, outputs_TN.T @ outputs_TN)
            else:
                states = calibration.run_layer(layer, states, None)
            progress.advance(1, f"layer {layer}")
    for layer in source.moe.further:
        yield layer, None
        progress.advance(1, f"layer {layer}")


def _fold_layer(
    source: SourceModel, layer: int, size: int, moments: Moments | None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tensors of a layer that change, by name, and the relative residuals of both projections.

    Letters at the end of tensor names: D hidden size, N and R the latent sizes before and after.

    Raises:
        NonFiniteError: A weight is NaN or infinite.
    """
    checkpoint, shape = source.checkpoint, source.moe.shape
    into, bias, out_of = _around(source, layer)

    def read(name: str) -> Tensor:
        if name not in checkpoint.tensors:  # the experts read the hidden states themselves
            return torch.eye(shape.hidden, dtype=torch.float64)
        return checkpoint.read_one(name).double()

    into_ND, out_DN = read(into), read(out_of)
    readers_NN, written_NN = (_gram(source, layer, projection) for projection in _STORED)
    inputs_NN = into_ND @ into_ND.T if moments is None else moments.inputs_NN.cpu()
    outputs_NN = written_NN if moments is None else moments.outputs_NN.cpu()
    expand_NR, reduce_RN, input_error = oblique_projection(readers_NN, inputs_NN, size)
    expand_out_NR, reduce_out_RN, output_error = oblique_projection(
        out_DN.T @ out_DN, outputs_NN, size
    )
    narrowed = {Projection.UP: expand_NR, Projection.DOWN: reduce_out_RN.T}
    tensors = source.moe.family.stored(layer).write(
        shape._replace(hidden=size),
        _STORED,
        (
            (projection, expert, _matrix(source, layer, projection, expert) @ by_NR)
            for projection, by_NR in narrowed.items()
            for expert in range(shape.experts)
        ),
        source.dtype,
    )
    tensors[into] = (reduce_RN @ into_ND).to(source.dtype)
    tensors[out_of] = (out_DN @ expand_out_NR).to(source.dtype)
    if bias in checkpoint.tensors:
        tensors[bias] = (reduce_RN @ checkpoint.read_one(bias).double()).to(source.dtype)
    return tensors, {"input_error": input_error, "output_error": output_error}


def _matrix(source: SourceModel, layer: int, projection: Projection, expert: int) -> Tensor:
    """One expert's matrix, (H, N), float64."""
    stack_1HN = source.stack(layer, projection, range(expert, expert + 1))
    with located(f"expert {expert}, {projection}"):
        check_finite(stack_1HN)
    return stack_1HN[0].double()


def _gram(source: SourceModel, layer: int, projection: Projection) -> Tensor:
    """Gram matrix of a stack, summed over experts and neurons, shape (N, N)."""
    shape = source.moe.shape
    gram_NN = torch.zeros(shape.hidden, shape.hidden, dtype=torch.float64)
    for expert in range(shape.experts):
        matrix_HN = _matrix(source, layer, projection, expert)
        gram_NN.addmm_(matrix_HN.T, matrix_HN)
    return gram_NN


def _config(source: SourceModel, size: int) -> dict[str, Any]:
    """config.json with the new size; nothing is quantized any more."""
    config = {k: v for k, v in source.checkpoint.config.items() if k != "quantization_config"}
    key, nested = _latent_of(source).size_key, config.get("text_config")
    if isinstance(nested, dict):
        return {**config, "text_config": {**nested, key: size}}
    return {**config, key: size}

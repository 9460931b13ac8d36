"""Results of the commands as data; `to_json` gives their JSON form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tuckerize.domain import (
    Cores,
    CoreType,
    MultilinearRank,
    Part,
    Size,
    StackResult,
    StackShape,
    Target,
)
from tuckerize.format.check import FileFault

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class InspectReport:
    """Composition of a model, from its headers and configuration.

    Attributes:
        model: The folder.
        family: `model_type`.
        layers: Indices of the layers with routed experts.
        shape: Sizes (E, H, I) of a projection's experts in a layer.
        top_k: Experts per token.
        shared_experts: Number of shared experts.
        dtype: safetensors' name of the routed experts' type.
        size: Parameters and bytes.
        tucker: Facts of the decomposition, for a Tucker checkpoint.
        coding: Encoding of the routed experts, where the model is quantized.
        notes: Remarks for the user on the checkpoint.
    """

    model: str
    family: str
    layers: tuple[int, ...]
    shape: StackShape
    top_k: int
    shared_experts: int
    dtype: str
    size: Size
    tucker: TuckerFacts | None = None
    coding: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TuckerFacts:
    """Origin of a Tucker checkpoint, and its shards.

    Attributes:
        source: The model it was made from; None where that is not known.
        layers: Indices of the decomposed layers.
        before: Size of the source.
        largest_residual: Largest relative residual of a stack; None where the weights may have been
            trained since.
        shardings: Folders of its shards: `tp4`, `tp2-ep2`.
        cores: Encoding of the cores, or by layer; None if they are not quantised.
        carries_loader: Whether transformers may load it with `trust_remote_code=True` as well as
            after `import tuckerize`.
        warnings: Causes not to trust the result.
    """

    source: str | None
    layers: tuple[int, ...]
    before: Size
    largest_residual: float | None
    shardings: tuple[str, ...]
    carries_loader: bool
    warnings: tuple[str, ...] = ()
    cores: Cores = None


@dataclass(frozen=True, slots=True)
class PlannedBytes:
    """Bytes of a model as its published configuration and a recipe give them.

    Attributes:
        routed_bytes: Of the routed experts.
        total_bytes: Of all tensors.
        bits_per_weight: Stored bits of the routed experts over the number of routed weights.
    """

    routed_bytes: int
    total_bytes: int
    bits_per_weight: float


@dataclass(frozen=True, slots=True)
class RecipeFacts:
    """A shipped recipe and the sizes that it plans.

    Attributes:
        name: Name, as `--recipe` takes it.
        model: Hugging Face id of the model.
        also: Other releases of the same sizes.
        layers: Number of layers with routed experts.
        shape: Sizes (E, H, I) of a projection's experts in a layer.
        routed_parameters: Parameters of the routed experts.
        before: Sizes of the release.
        after: Sizes by target, the recipe's default first.
    """

    name: str
    model: str
    also: str
    layers: int
    shape: StackShape
    routed_parameters: int
    before: PlannedBytes
    after: dict[str, PlannedBytes]


@dataclass(frozen=True, slots=True)
class RecipesReport:
    """The shipped recipes of published models.

    Attributes:
        recipes: One for each model, by name.
    """

    recipes: tuple[RecipeFacts, ...]


@dataclass(frozen=True, slots=True)
class CheckReport:
    """Result of hashing the files of a Tucker checkpoint and of its shards.

    Attributes:
        folder: The Tucker checkpoint.
        files: Number of files that manifests record.
        bytes: Their bytes.
        faults: Files that are not as they were written.
        notes: Remarks for the user: what could not be checked.
    """

    folder: str
    files: int
    bytes: int
    faults: tuple[FileFault, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every file is as it was written."""
        return not self.faults


@dataclass(frozen=True, slots=True)
class StackPlan:
    """Target of one stack.

    Attributes:
        layer: Index of the layer.
        group: Index of the group.
        projection: Projection, or `gate_up_proj` for two that share one U_I.
        multilinear_rank: Core sizes; None where a tolerance decides them.
        tolerance: That tolerance, or None.
        bytes_before: Bytes of the dense stacks.
        bytes_after: Bytes stored; at most the dense ones' where a tolerance decides.
    """

    layer: int
    group: int
    projection: str
    multilinear_rank: MultilinearRank | None
    tolerance: float | None
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, slots=True)
class Duration:
    """Estimated time of a run in one process, on this CPU as busy as it is.

    Attributes:
        least: Seconds at least.
        most: Seconds at most.
        rate: Floating-point operations per second of a float32 GEMM, measured before.
        times_products: Least and largest time of a run over that of its products at this rate.
    """

    least: float
    most: float
    rate: float
    times_products: tuple[float, float]

    @property
    def text(self) -> str:
        """The range and what it rests on, in words."""
        unit, scale = next(
            (unit, scale)
            for unit, scale, limit in (
                ("s", 1, 90),
                ("min", 60, 90),
                ("h", 3600, 48),
                ("days", 86400, math.inf),
            )
            if self.most / scale < limit
        )
        least, most = (float(f"{value / scale:.2g}") for value in (self.least, self.most))
        few, many = self.times_products
        expected = f"about {least:g} to {most:g}" if self.least >= 1 else f"at most {most:g}"
        return (
            f"{expected} {unit} ({few:g} to {many:g} times its products at "
            f"{self.rate / 1e9:.0f} GFLOP/s, measured on the CPU now)"
        )


@dataclass(frozen=True, slots=True)
class PlanReport:
    """Sizes and costs of a planned decomposition.

    Attributes:
        stacks: Every stack.
        before: Size of the source.
        after: Size of the result; an upper bound where a tolerance decides.
        peak_bytes: Estimated peak memory of one process.
        duration: Estimated time of one process, without the profile of a calibrated budget.
        predicted_kl: Predicted KL divergence from the source, nats per token; None without a
            calibrated budget.
    """

    stacks: tuple[StackPlan, ...]
    before: Size
    after: Size
    peak_bytes: int
    duration: Duration
    predicted_kl: float | None = None


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Predicted cost of one budget, spent in one way.

    Attributes:
        bits: Bits per routed weight that were asked for; about these are stored, or fewer.
        target: Engines that the result would be made for.
        encodings: Encodings that the planner could choose among: `none`, `w8`, `w4`, or `best` of
            all, by layer where the target allows it.
        cores: Encoding that it chose, or by layer.
        routed_parameters: Parameters of the routed experts that would be stored.
        routed_bytes: Bytes of them.
        total_bytes: Bytes of the whole checkpoint.
        kl: Predicted KL divergence from the source, nats per token.
        largest_error: Largest predicted relative output error of a layer.
        truncated: Whether anything is truncated; otherwise the size is quantisation alone.
    """

    bits: float
    target: Target
    encodings: str
    cores: Cores
    routed_parameters: int
    routed_bytes: int
    total_bytes: int
    kl: float
    largest_error: float
    truncated: bool


@dataclass(frozen=True, slots=True)
class CurveReport:
    """Predicted KL divergence at every budget.

    Attributes:
        model: The folder.
        before: Size of the source.
        points: The budgets, the largest first, for every target and every choice of encodings.
        notes: Remarks for the user on the calibration.
    """

    model: str
    before: Size
    points: tuple[CurvePoint, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FitChoice:
    """The largest experts of one encoding that fit onto devices.

    Attributes:
        target: Engines that the result would be made for.
        cores: Encoding; None for the type of the source.
        kept: Share of the routed parameters.
        bits: Bits per routed weight of the dense model.
        device_bytes: Bytes of the experts on the device that has the most.
        total_bytes: Bytes of the whole checkpoint.
    """

    target: Target
    cores: CoreType | None
    kept: float
    bits: float
    device_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class FitReport:
    """Sizes that fit onto devices that serve a model with tensor parallelism.

    Attributes:
        model: The folder.
        devices: Number of devices.
        device_bytes: Memory of each.
        reserved_bytes: Part of it that engines leave alone, or need for activations.
        rest_bytes: Bytes of everything but the routed experts on a device.
        cache_bytes: Bytes of the key-value cache on a device, in 16 bits.
        context: Tokens of a sequence.
        sequences: Sequences that are served at the same time.
        source_bits: Bits per routed weight of the source.
        bits: The most bits per routed weight that fit.
        choices: The largest experts of every encoding and target that fit.
        curve: Predicted cost of this size; None without a calibration text.
        notes: Remarks for the user.
    """

    model: str
    devices: int
    device_bytes: int
    reserved_bytes: int
    rest_bytes: int
    cache_bytes: int
    context: int
    sequences: int
    source_bits: float
    bits: float
    choices: tuple[FitChoice, ...]
    curve: CurveReport | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerOutcome:
    """Outcome of the calibration of one layer.

    Attributes:
        layer: Index of the layer.
        neurons: Width: neurons that every expert keeps.
        output_error: Relative output error on the validation set, each token relative to the
            norm of its hidden state after the layer; None without a validation set.
        predicted_error: The same as predicted; None where core sizes were given.
    """

    layer: int
    neurons: int
    output_error: float | None
    predicted_error: float | None


@dataclass(frozen=True, slots=True)
class DecomposeReport:
    """Result of a decomposition.

    Attributes:
        output: The Tucker checkpoint.
        stacks: Every stack.
        before: Size of the source.
        after: Size of the result.
        resumed_pieces: Pieces of work that an interrupted run had finished.
        seconds: Time of this run.
        calibrated: Outcome of every calibrated layer; empty for a data-free decomposition.
        predicted_kl: Predicted KL divergence from the source, nats per token; None without a
            calibrated budget.
        notes: Remarks for the user on the calibration.
        warnings: Causes not to trust the result.
    """

    output: str
    stacks: tuple[StackResult, ...]
    before: Size
    after: Size
    resumed_pieces: int
    seconds: float
    calibrated: tuple[LayerOutcome, ...] = ()
    predicted_kl: float | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """Result of quantising the cores of a Tucker checkpoint.

    Attributes:
        output: The new checkpoint.
        cores: Encoding of its cores.
        dense: Size of the dense model.
        before: Size of the checkpoint that was quantised.
        after: Size of the result.
        largest_residual_before: Largest relative residual of a stack before (unitless); None if the
            weights were trained after the decomposition.
        largest_residual: The same after.
    """

    output: str
    cores: CoreType
    dense: Size
    before: Size
    after: Size
    largest_residual_before: float | None
    largest_residual: float


@dataclass(frozen=True, slots=True)
class HealReport:
    """Result of training a Tucker checkpoint.

    Attributes:
        output: The new checkpoint.
        trained: Parts of the model that were trained.
        parameters: Number of trained parameters.
        steps: Steps that were made.
        best_step: Steps before the state that was kept; 0 if none was better than the first.
        tokens: Tokens that were predicted in these.
        seconds: Time of the run; of the part after an interruption.
        nats_before: Negative log-likelihood on the validation set before, nats per token.
        nats_after: The same of the result.
        curve: The same after some numbers of steps.
        notes: Remarks for the user.
    """

    output: str
    trained: tuple[Part, ...]
    parameters: int
    steps: int
    best_step: int
    tokens: int
    seconds: float
    nats_before: float
    nats_after: float
    curve: tuple[tuple[int, float], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LayoutCost:
    """Costs of one layout.

    Attributes:
        layout: Its name.
        bytes_per_process: Bytes of the largest process's shards.
        traffic_per_token: Bytes that each process sends for one token through all layers.
    """

    layout: str
    bytes_per_process: int
    traffic_per_token: float


@dataclass(frozen=True, slots=True)
class ShardReport:
    """Result of a sharding.

    Attributes:
        folder: Where the shards are.
        tp_size: Tensor-parallel processes.
        ep_size: Expert-parallel processes.
        layout: The layout that was written.
        costs: Every layout's costs.
        dense_traffic_per_token: The same traffic of the dense model, split as Megatron does.
        uneven: Tensors of which the first processes own one row or column more than the last.
        files: Number of files.
    """

    folder: str
    tp_size: int
    ep_size: int
    layout: str
    costs: tuple[LayoutCost, ...]
    dense_traffic_per_token: float
    uneven: tuple[str, ...]
    files: int


@dataclass(frozen=True, slots=True)
class LayerVerdict:
    """Findings of a verification on one layer.

    Attributes:
        layer: Index of the layer.
        sharding_error: Largest relative difference of a token's output, sharded against unsharded,
            on any process; None where a file of the layer is damaged.
        output_error: Relative output error of the Tucker layer against the dense one on the tokens;
            None without the source.
        residual_recorded: Largest relative residual that decompose recorded for a stack; None where
            the weights may have been trained since.
        residual_difference: Largest |measured − recorded| relative residual of a stack; None
            without the source, or without a recorded one.
        failures: Faults found; empty if there are none.
        warnings: Causes not to trust the layer that are no fault of its files.
    """

    layer: int
    sharding_error: float | None
    output_error: float | None
    residual_recorded: float | None
    residual_difference: float | None
    failures: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CollectiveTraffic:
    """Traffic of one kind of collective, in bytes that a process sends per token of its own.

    All are averages over processes and tokens, through all verified layers.

    Attributes:
        kind: The kind.
        counted: Measured traffic.
        predicted: Traffic that the layout predicts.
        dense: Traffic of the dense model, split as Megatron does on the same mesh.
    """

    kind: str
    counted: float
    predicted: float
    dense: float


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Result of a verification.

    Attributes:
        folder: The Tucker checkpoint.
        tp_size: Tensor-parallel processes.
        ep_size: Expert-parallel processes.
        cp_size: Context-parallel processes.
        sequence_parallel: Whether each of the tensor-parallel processes had its own tokens.
        layout: Layout of the shards, or `unsharded`.
        device: Type of the device.
        tokens: Number of tokens.
        tolerance: Bound on the sharding error.
        layers: Every verified layer.
        traffic: Traffic of every kind of collective.
        dtype: Type in which the layers were computed.
        float32_products: Precision in which the device multiplies float32 matrices.
        dispatch: How tokens went to the processes of their experts: with `plain` collectives or
            Ascend's `fused` operators; None where experts are not split.
        fused_unmet: On an NPU, the first constraint of the fused operators that is not met.
        damaged: Files that are not as they were written. Where the layers are computed from one
            of them, none is verified.
        not_verified: Folders of shards that were not looked at.
        notes: Remarks for the user: what was not compared.
    """

    folder: str
    tp_size: int
    ep_size: int
    cp_size: int
    sequence_parallel: bool
    layout: str
    device: str
    tokens: int
    tolerance: float
    layers: tuple[LayerVerdict, ...]
    traffic: tuple[CollectiveTraffic, ...]
    dtype: str = "float32"
    float32_products: str = "float32"
    dispatch: str | None = None
    fused_unmet: str | None = None
    damaged: tuple[FileFault, ...] = ()
    not_verified: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no file is damaged and no layer has a failure."""
        return not self.damaged and not any(layer.failures for layer in self.layers)


@dataclass(frozen=True, slots=True)
class ReconstructReport:
    """Result of a reconstruction.

    Attributes:
        output: The ordinary checkpoint.
        size: Its size.
        layers: Indices of the expanded layers.
        intermediate_size: Width of every routed expert.
        cores: Encoding of the experts; None for the type of the factors.
        dequantised_because: Why quantised cores were written in that type; None if they were not,
            or if it was asked for.
    """

    output: str
    size: Size
    layers: tuple[int, ...]
    intermediate_size: int
    cores: CoreType | None = None
    dequantised_because: str | None = None


@dataclass(frozen=True, slots=True)
class FoldedLayer:
    """A layer whose experts compute in a smaller latent space.

    Attributes:
        layer: Index of the layer.
        input_error: Relative residual of what the experts read of the space, up_proj applied.
        output_error: The same of what they write, as the hidden states see it.
    """

    layer: int
    input_error: float
    output_error: float


@dataclass(frozen=True, slots=True)
class FoldReport:
    """Result of making a latent space smaller.

    Attributes:
        output: The ordinary checkpoint.
        layers: Its layers with routed experts.
        latent_before: Size of the latent space of the source.
        latent_size: Its size now.
        before: Size of the source.
        after: Size of the result.
        notes: Remarks for the user on the calibration.
    """

    output: str
    layers: tuple[FoldedLayer, ...]
    latent_before: int
    latent_size: int
    before: Size
    after: Size
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over the windows of a text.

    Attributes:
        value: The mean.
        error: Its standard error; None of a single window.
    """

    value: float
    error: float | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Perplexity of one checkpoint on a text.

    Attributes:
        folder: The checkpoint.
        nats: Mean negative log-likelihood per token, in nats.
        perplexity: Its exponential.
        perplexity_error: Standard error of the perplexity; None of a single window.
        size: Parameters and bytes of the checkpoint.
        seconds: Wall time of its layers.
    """

    folder: str
    nats: float
    perplexity: float
    perplexity_error: float | None
    size: Size
    seconds: float


@dataclass(frozen=True, slots=True)
class Divergence:
    """Divergence of the predictions of a checkpoint from those of another, on the same tokens.

    Attributes:
        perplexity_ratio: Its perplexity over the other's (unitless).
        kl: KL divergence of its prediction from the other's, nats per token.
        same_top: Share of the tokens with the same most likely next token.
        experts_changed: Share of the tokens whose set of routed experts differs in at least one
            layer; None where the two have not the same layers of experts.
    """

    perplexity_ratio: Estimate
    kl: Estimate
    same_top: Estimate
    experts_changed: Estimate | None


@dataclass(frozen=True, slots=True)
class EvaluateReport:
    """Perplexity of checkpoints on the same text.

    Attributes:
        results: The checkpoints, in the order that was asked for.
        tokens: Tokens that each predicted.
        texts: The texts, over which the tokens are evenly spread.
        window: Tokens that are read at once; all but the first of a window are predicted.
        divergence: Of the last from the first, where there are two.
        notes: Remarks for the user on the text.
    """

    results: tuple[Evaluation, ...]
    tokens: int
    texts: tuple[str, ...]
    window: int
    divergence: Divergence | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PushReport:
    """Files that were uploaded to the Hugging Face Hub, or would be.

    Attributes:
        folder: The result.
        repository: Id of the repository.
        files: Names of the files.
        bytes: Bytes of all of them.
        card: The model card as uploaded.
        url: Address of the repository; None of a dry run.
        notes: Remarks for the user on the card.
    """

    folder: str
    repository: str
    files: tuple[str, ...]
    bytes: int
    card: str
    url: str | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Problem:
    """Fault of a machine or its environment.

    Attributes:
        message: The fault.
        hint: Its remedy.
    """

    message: str
    hint: str


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """The device that torch finds.

    Attributes:
        kind: Its type: npu, cuda or cpu.
        count: How many there are.
        name: Name of the first.
        backend: Collective backends of a run on them.
        float32_products: Precision in which they multiply float32 matrices.
        free_bytes: Free memory of the first, or of the host.
        total_bytes: All of it.
        generation: Generation of an NPU: A2 or A3; None for any other device.
    """

    kind: str
    count: int
    name: str
    backend: str
    float32_products: str
    free_bytes: int
    total_bytes: int
    generation: str | None = None


@dataclass(frozen=True, slots=True)
class Variable:
    """Environment variable that affects a run.

    Attributes:
        name: Its name.
        value: Its value, or None if it is not set.
        default: Behaviour where it is not set.
    """

    name: str
    value: str | None
    default: str


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """State of a machine, and its faults.

    Attributes:
        versions: Versions by package, CANN's among them; None where not installed.
        cann_expected: The CANN that the installed torch_npu is for; None if that is not known.
        device: The device; None if torch cannot be imported.
        variables: Variables of the device and its collectives.
        problems: Faults found.
    """

    versions: Mapping[str, str | None]
    cann_expected: str | None
    device: DeviceFacts | None
    variables: tuple[Variable, ...]
    problems: tuple[Problem, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def to_json(report: Any) -> dict[str, Any]:  # noqa: ANN401
    """A report as JSON values, its own derived verdict included."""
    value: dict[str, Any] = {"schema_version": SCHEMA_VERSION, **asdict(report)}
    if isinstance(report, CheckReport | VerifyReport | DoctorReport):
        value["passed"] = report.passed
    return {key: _finite(item) for key, item in value.items()}


def _finite(value: Any) -> Any:  # noqa: ANN401
    """JSON has no NaN and no infinity: they become text."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value

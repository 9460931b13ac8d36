"""Reports of the commands that write a checkpoint, or its shards."""

from __future__ import annotations

from dataclasses import dataclass

from tuckerize.domain import CoreType, Part, Size, StackResult


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

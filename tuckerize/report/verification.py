"""Report of verify."""

from __future__ import annotations

from dataclasses import dataclass

from tuckerize.format.check import FileFault


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

"""Reports on what is on disk: inspect, check, push."""

from __future__ import annotations

from dataclasses import dataclass

from tuckerize.domain import Cores, Size, StackShape
from tuckerize.format.check import FileFault


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

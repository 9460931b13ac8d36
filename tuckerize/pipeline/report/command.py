"""One HTML page of what a Tucker checkpoint records of itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from tuckerize.checkpoint.files import read_json_object
from tuckerize.checkpoint.output import REPORT
from tuckerize.domain import cores_of
from tuckerize.errors import UsageError
from tuckerize.format.manifest import TuckerManifest, available_shardings, read_shard_manifest
from tuckerize.format.records import LayerRecord
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.format.warnings import warnings_of
from tuckerize.healing.result import LOG
from tuckerize.pipeline.evaluation_record import evaluation_rows, find_evaluation
from tuckerize.pipeline.report.charts import chart
from tuckerize.pipeline.report.page import (
    GENERATOR,
    page,
    preformatted,
    section,
    table,
    warning,
)
from tuckerize.pipeline.report.predicted import predictions

_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportRequest:
    """A page to write.

    Attributes:
        folder: The Tucker checkpoint.
        html: File of the page; an earlier page of ours is replaced, no other file.
        against: Another Tucker checkpoint of the same model, shown beside it.
    """

    folder: Path
    html: Path = Path("report.html")
    against: Path | None = None


def write_report(request: ReportRequest) -> Path:
    """Write a page on a Tucker checkpoint: what its files record.

    Predictions are drawn where the source, its text and its profile are on this machine.

    Args:
        request: The checkpoint and the page.

    Raises:
        TuckerizeError: A checkpoint cannot be read, or the file is not a page of ours.

    Example:
        >>> write_report(ReportRequest(folder="OUT"))  # doctest: +SKIP
    """
    file = Path(request.html)
    if file.is_dir():
        raise UsageError(f"{file} is a folder", hint=f"name a file: --html {file / 'report.html'}")
    if file.exists() and GENERATOR not in file.read_text(encoding="utf-8", errors="replace"):
        raise UsageError(
            f"{file} exists and is no report of tuckerize", hint="give another name with --html"
        )
    names = [request.folder, *([request.against] if request.against is not None else [])]
    short = [Path(name).resolve().name for name in names]
    labels = short if len({*short}) == len(names) else [str(name) for name in names]
    opened = {
        label: TuckerCheckpoint.open(Path(name)) for label, name in zip(labels, names, strict=True)
    }
    file.write_text(_page(opened), encoding="utf-8")
    return file


def _page(opened: dict[str, TuckerCheckpoint]) -> str:
    warnings = [
        warning(f"{name}: {text}" if len(opened) > 1 else text)
        for name, tucker in opened.items()
        for text in warnings_of(tucker.manifest)
    ]
    sections = [*warnings, _sizes(opened), _layers(opened)]
    for name, tucker in opened.items():
        of = f" of {name}" if len(opened) > 1 else ""
        sections += [
            *_quality(tucker, of),
            *predictions(tucker, of),
            *_healing(tucker, of),
            *_verifications(tucker, of),
            section(
                f"Reproduce{of}",
                preformatted(yaml.safe_dump(_origin(tucker.manifest), sort_keys=False)),
            ),
        ]
    return page(" and ".join(opened), sections)


def _sizes(opened: dict[str, TuckerCheckpoint]) -> str:
    manifests = [tucker.manifest for tucker in opened.values()]
    first = manifests[0].before
    sizes = [first, *(manifest.after for manifest in manifests)]
    rows = [
        ("routed parameters", *(f"{size.routed_parameters:,}" for size in sizes)),
        ("routed bytes", *(f"{size.routed_bytes:,}" for size in sizes)),
        ("all bytes", *(f"{size.total_bytes:,}" for size in sizes)),
        ("bits per routed weight", *(f"{size.bits_per_weight(first):.2f}" for size in sizes)),
    ]
    return section("Size", table(("", "source", *opened), rows))


def _layers(opened: dict[str, TuckerCheckpoint]) -> str:
    layers = sorted({layer for own in opened.values() for layer in own.manifest.layers})
    residuals = {
        name: [_residual(tucker.manifest, layer) for layer in layers]
        for name, tucker in opened.items()
    }
    stored = {
        name: [_bytes(tucker, layer) / _MIB for layer in layers] for name, tucker in opened.items()
    }
    charts = [
        chart("MiB stored in a layer", layers, stored, bars=True, along="layer"),
        chart("largest residual", layers, residuals, bars=True, along="layer"),
    ]
    first = next(iter(opened.values())).manifest
    if first.calibrated:
        errors: dict[str, list[float | None]] = {
            "measured": [_record(first, layer, "output_error") for layer in layers],
            "predicted": [_record(first, layer, "predicted_error") for layer in layers],
        }
        charts.append(chart("output error, held-out", layers, errors, bars=True, along="layer"))
    rows = [
        (f"layer {layer}, group {stack.group}, {stack.projection}", str(stack.multilinear_rank),
         str(cores_of(first.cores, layer) or first.dtype), f"{stack.relative_residual:.4f}")
        for layer in layers for stack in first.stacks if stack.layer == layer
    ]  # fmt: skip
    header = ("stack", "r_E,r_H,r_I", "cores", "relative residual")
    return section("Layers", *charts, table(header, rows))


def _residual(manifest: TuckerManifest, layer: int) -> float | None:
    found = [stack.relative_residual for stack in manifest.stacks if stack.layer == layer]
    return max(found) if found and manifest.healed is None else None


def _bytes(tucker: TuckerCheckpoint, layer: int) -> int:
    if layer not in tucker.manifest.layers:
        return 0
    groups = range(tucker.manifest.groups)
    return sum(h.bytes for g in groups for h in tucker.group_headers(layer, g).values())


def _record(manifest: TuckerManifest, layer: int, field: str) -> float | None:
    records: dict[int, LayerRecord] = {record.layer: record for record in manifest.calibrated}
    return getattr(records[layer], field) if layer in records else None


def _quality(tucker: TuckerCheckpoint, of: str) -> list[str]:
    found = find_evaluation(tucker)
    if found is None:
        return []
    return [section(f"Quality{of}", table(("measured", ""), evaluation_rows(found)))]


def _healing(tucker: TuckerCheckpoint, of: str) -> list[str]:
    log, healed = tucker.folder / LOG, tucker.manifest.healed
    if healed is None:
        return []
    rows = [
        ("nats per token before", f"{healed.nats_before:.4f}"),
        ("nats per token after", f"{healed.nats_after:.4f}"),
        ("kept after step", f"{healed.best_step} of {healed.steps}"),
    ]
    parts = [table(("", "validation set"), rows)]
    if log.exists():
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        curve = {line["step"]: line["validation_nats"] for line in lines
                 if "validation_nats" in line}  # fmt: skip
        series = {"validation": list(curve.values())}
        parts.append(chart("nats per token", list(curve), series, bars=False, along="step"))
    return [section(f"Recovery training{of}", *parts)]


def _verifications(tucker: TuckerCheckpoint, of: str) -> list[str]:
    rows = []
    for name in ("", *available_shardings(tucker.folder)):
        folder, largest, layout = tucker.folder / name, "", "unsharded"
        if name:
            manifest = read_shard_manifest(folder)
            ranks: dict[tuple[int, int], int] = {}
            for shard in manifest.shards:
                place = (shard.tp_rank, shard.ep_rank)
                ranks[place] = ranks.get(place, 0) + shard.file.bytes
            largest, layout = f"{max(ranks.values()):,}", f"{name}, {manifest.layout}"
        verdict, sent = "not verified", ""
        if (folder / REPORT).exists():
            found = read_json_object(folder / REPORT)
            verdict = "passed" if found["passed"] else "FAILED"
            sent = f"{sum(one['counted'] for one in found['traffic']):,.1f}" if name else ""
        rows.append((layout, largest, sent, verdict))
    header = ("shards", "bytes, largest process", "bytes sent per token", "verify")
    return [section(f"Shards{of}", table(header, rows))]


def _origin(manifest: TuckerManifest) -> dict[str, object]:
    source = manifest.source
    return {
        "tuckerize": manifest.tuckerize_version,
        "model": None if source is None else source.model,
        "config_sha256": None if source is None else source.config_sha256,
        "weight_files": {} if source is None else {file.name: file.sha256 for file in source.files},
        "recipe": manifest.recipe,
        "healed": None if manifest.healed is None else manifest.healed.model_dump(mode="json"),
    }

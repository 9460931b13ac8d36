"""Verify on the devices that shards compute the same as the unsharded layers.

Process 0 makes tokens for a layer, routes them with the model's own router, and computes the
unsharded Tucker layer on the host in float64, from expert weights that it expands one by one. Every
process loads its own shards, computes its tokens on its device in float32 together with the others,
and compares the results; the collectives' traffic is counted. With the source at hand the Tucker
layer is also compared with the dense one, and its residuals with those that decompose recorded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tuckerize.domain import Dtype, Layout, Projection, group_experts
from tuckerize.format.shards import Sharding
from tuckerize.format.tucker_checkpoint import TuckerCheckpoint
from tuckerize.format.warnings import is_worse_on_text, worse_than_nothing
from tuckerize.linalg.tucker import relative_residual
from tuckerize.moe.routing import Routes, route
from tuckerize.moe.source import SourceModel
from tuckerize.names import TensorName
from tuckerize.parallel.backends import float32_products
from tuckerize.parallel.collectives import counted
from tuckerize.parallel.layouts import Traffic, layer_traffic
from tuckerize.parallel.mesh import Position, own_tokens, padded_count
from tuckerize.parallel.processes import Processes
from tuckerize.pipeline.shard import dense_sizes
from tuckerize.pipeline.verify.placement import Placement, make_placement
from tuckerize.pipeline.verify.traffic import LayerMoved, compare, load_of
from tuckerize.progress import Progress
from tuckerize.report.verification import LayerVerdict, VerifyReport
from tuckerize.runtime.activations import Activation, activation_of
from tuckerize.runtime.dense import ExpertWeights, dense_output
from tuckerize.runtime.experts import TuckerExperts
from tuckerize.runtime.sharded import ShardedExperts

# float32 rounds to 6e-8; over sums of some thousand terms that grows to about 3e-6. A wrong value
# in a slice that a token uses moves that token's output by orders of magnitude more.
SHARDING_TOLERANCE = 1e-5
TOLERANCES = {
    Dtype.FLOAT32: SHARDING_TOLERANCE,
    Dtype.BFLOAT16: 4e-2,
    Dtype.FLOAT16: 5e-3,
}
"""Bounds on the sharding error; those of 16-bit types (unit roundoff 4e-3 and 5e-4) detect gross
errors only."""
# Measured from the same stored values as the recorded one; only the order of sums differs.
RESIDUAL_TOLERANCE = 1e-4

_SEED = 0


class _Case(NamedTuple):
    """Tokens before a layer's experts, their routes, and the unsharded output (float64)."""

    x_TI: Tensor
    routes: Routes
    reference_TI: Tensor

    def of(self, own_T: Tensor | slice) -> _Case:
        """Case of some of the tokens."""
        routes = Routes(self.routes.experts[own_T], self.routes.weights[own_T])
        return _Case(self.x_TI[own_T], routes, self.reference_TI[own_T])


class _AgainstSource(NamedTuple):
    """Errors of a Tucker layer against its source."""

    output_error: float
    residual_difference: float


@dataclass(frozen=True, slots=True)
class Verification:
    """Checkpoint to verify, its shards and source, and the processes that do it.

    Attributes:
        tucker: The Tucker checkpoint.
        sharding: Its shards for these processes; None verifies unsharded layers in one process.
        source: The dense checkpoint it was made from, if at hand.
        processes: The processes of the run.
        device: This process's device.
        tokens: Number of tokens per layer.
        sequence_parallel: Whether each of the tensor-parallel processes has its own tokens.
        dtype: Type to compute layers in: float32, bfloat16 or float16.
    """

    tucker: TuckerCheckpoint
    sharding: Sharding | None
    source: SourceModel | None
    processes: Processes
    device: torch.device
    tokens: int
    sequence_parallel: bool = False
    dtype: Dtype = Dtype.FLOAT32

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type itself."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def activation(self, layer: int) -> Activation:
        """The activation of the experts of a layer."""
        return activation_of(self.tucker.family.glu(self.tucker.config, layer))

    @property
    def tolerance(self) -> float:
        """Bound on the sharding error."""
        return TOLERANCES[self.dtype]


def verify_layers(
    run: Verification,
    *,
    layers: Sequence[int],
    damaged: Mapping[int, Sequence[str]] | None = None,
    max_output_error: float | None,
    progress: Progress,
) -> VerifyReport:
    """Verify layers; every process returns the same report.

    Args:
        run: The verification.
        layers: Indices of the layers.
        damaged: Faults of the files of shards, by layer; such a layer is not computed.
        max_output_error: Bound on the relative output error against the dense layer, if any.
        progress: Shows how far the work is.
    """
    place = _place(run)
    position = place.position
    tokens = padded_count(run.tokens, position.parallelism)
    own_T = own_tokens(tokens, position)
    mine = layers[run.processes.rank :: run.processes.size] if run.source else ()
    progress.start(len(layers) + len(mine))
    faults = damaged or {}
    sharding_errors: dict[int, float] = {}
    cases, moved = {}, []
    for layer in layers:
        progress.stage(f"layer {layer}: reference")
        case = _case_of_leader(run, layer, tokens)
        if layer in mine:
            cases[layer] = case
        if not faults.get(layer):
            progress.stage(f"layer {layer}: load")
            experts = _load(run, layer, place).to(run.device)
            if layer == layers[0] and run.device.type != "cpu":
                progress.stage(f"layer {layer}: warm-up, in which the device compiles its kernels")
                _sharding_error(experts, case.of(own_T), run)
            progress.stage(f"layer {layer}: shards")
            with counted() as sent:
                error = _sharding_error(experts, case.of(own_T), run)
            moved.append(LayerMoved(sent, *_predicted(run, layer, case, place)))
            sharding_errors[layer] = max(run.processes.gather(error), key=_nan_last)
        progress.advance(1, f"layer {layer}: shards")
    found = {}
    for layer, case in cases.items():
        progress.stage(f"layer {layer}: source")
        found[layer] = _against_source(run, layer, case.of(slice(run.tokens)))
        progress.advance(1, f"layer {layer}: source")
    against = {la: result for own in run.processes.gather(found) for la, result in own.items()}
    progress.close()
    return VerifyReport(
        folder=str(run.tucker.folder),
        tp_size=position.tp.size,
        ep_size=position.ep.size,
        cp_size=position.cp.size,
        sequence_parallel=run.sequence_parallel,
        layout=run.sharding.manifest.layout if run.sharding else "unsharded",
        device=run.device.type,
        tokens=run.tokens,
        tolerance=run.tolerance,
        layers=tuple(
            _verdict(
                run,
                layer,
                faults=faults.get(layer, ()),
                sharding_error=sharding_errors.get(layer),
                against=against.get(layer),
                max_output_error=max_output_error,
            )
            for layer in layers
        ),
        traffic=compare(moved, run.processes, tokens // (position.ep.size * position.cp.size)),
        dtype=run.dtype,
        float32_products=float32_products(run.device),
        dispatch=place.dispatch,
        fused_unmet=place.unmet,
    )


def _place(run: Verification) -> Placement:
    """Placement of this process; all processes make the communicators of the run here."""
    if run.sharding is None:
        return Placement(Position())
    return make_placement(
        run.device,
        run.sharding,
        tokens=run.tokens,
        dtype=run.torch_dtype,
        sequence_parallel=run.sequence_parallel,
        timeout=run.processes.timeout,
    )


def _load(run: Verification, layer: int, place: Placement) -> TuckerExperts:
    """This process's shards of a layer, or all of it."""
    if run.sharding is not None:
        return ShardedExperts.of_layer(run.sharding, layer, place.position, fused=place.fused)
    groups = _read_groups(run.tucker, layer)
    size = run.tucker.manifest.group_size
    return TuckerExperts(groups, group_size=size, activation=run.activation(layer))


def _case_of_leader(run: Verification, layer: int, tokens: int) -> _Case:
    """Case of a layer that process 0 makes, on every process."""
    case = None
    if run.processes.is_leader:
        with run.processes.while_others_wait():
            case = _case(run, layer, tokens)
    return run.processes.broadcast(case)


@torch.no_grad()
def _sharding_error(experts: TuckerExperts, case: _Case, run: Verification) -> float:
    """Largest relative difference of a token's output on this process from the unsharded one."""
    output_TI = experts(
        case.x_TI.to(run.device, run.torch_dtype),
        case.routes.experts.to(run.device),
        case.routes.weights.to(run.device),
    )
    difference_T = (output_TI.cpu().double() - case.reference_TI).norm(dim=1)
    scale_T = case.reference_TI.norm(dim=1)
    return float((difference_T / scale_T.clamp_min(torch.finfo(torch.float32).tiny)).max())


def _predicted(
    run: Verification, layer: int, case: _Case, place: Placement
) -> tuple[Traffic, Traffic]:
    """Predicted traffic of a layer's tokens, and that of the dense model."""
    if run.sharding is None:
        return {}, {}
    sizes, mesh = run.tucker.manifest.layer_shape(layer), place.position.parallelism
    load = load_of(case.routes.experts, sizes, mesh)
    value_bytes = run.torch_dtype.itemsize
    width = None if place.fused is None else place.fused.use.hidden
    layout = run.sharding.layout
    dense = dense_sizes(run.tucker.manifest)
    return (
        layer_traffic(layout, sizes, mesh, load, value_bytes=value_bytes, fused_width=width),
        layer_traffic(Layout.INTERMEDIATE, dense, mesh, load, value_bytes=value_bytes),
    )


def _case(run: Verification, layer: int, tokens: int) -> _Case:
    """Tokens of a layer as its norm would scale them, routed by its router, and their output.

    They are followed by as many zeros as the mesh needs.
    """
    tucker = run.tucker
    model = run.source or tucker
    generator = torch.Generator().manual_seed(_SEED + layer)
    x_TI = torch.randn(run.tokens, tucker.manifest.shape.hidden, generator=generator)
    x_TI *= model.input_norm(layer)
    x_TI = functional.pad(x_TI, (0, 0, 0, tokens - run.tokens)).to(run.torch_dtype).float()
    router, routing = model.router(layer), tucker.family.routing(tucker.config)
    tokens_T = None
    if router.experts_Vk is not None:
        tokens_T = torch.randint(len(router.experts_Vk), (tokens,), generator=generator)
    routes = route(x_TI, router, routing, tokens_T)
    if routing.scales_inputs:
        x_TI = (x_TI * routes.weights).to(run.torch_dtype).float()
        routes = routes._replace(weights=torch.ones_like(routes.weights))
    places = range(tucker.manifest.groups)
    groups = [tucker.read_factors(layer, group) for group in places]
    biases: dict[Projection, list[Tensor]] = {}
    for group in places:
        for projection, bias in tucker.read_biases(layer, group).items():
            biases.setdefault(projection, []).extend(bias)

    def expand_expert(expert: int) -> ExpertWeights:
        group, place = divmod(expert, tucker.manifest.group_size)
        gate_HI, up_HI, down_HI = (
            groups[group][projection].expand_slice(place, torch.float64)
            for projection in Projection
        )
        return ExpertWeights(gate_HI, up_HI, down_HI.T)

    reference_TI = dense_output(
        x_TI.double(),
        routes.experts,
        routes.weights,
        expert_weights=expand_expert,
        activation=run.activation(layer),
        biases=list(biases.values()),
    )
    return _Case(x_TI, routes, reference_TI)


def _read_groups(tucker: TuckerCheckpoint, layer: int) -> list[dict[TensorName, Tensor]]:
    return [tucker.read_group(layer, group) for group in range(tucker.manifest.groups)]


def _against_source(run: Verification, layer: int, case: _Case) -> _AgainstSource:
    if run.source is None:
        raise TypeError("there is no source to compare with")
    source = run.source

    def read_expert(expert: int) -> ExpertWeights:
        gate_HI, up_HI, down_HI = source.expert(layer, expert)
        return ExpertWeights(gate_HI, up_HI, down_HI.T)

    dense_TI = dense_output(
        case.x_TI.double(),
        case.routes.experts,
        case.routes.weights,
        expert_weights=read_expert,
        activation=run.activation(layer),
        biases=[list(bias) for bias in source.biases(layer).values()],
    )
    error = float((case.reference_TI - dense_TI).norm() / dense_TI.norm())
    return _AgainstSource(error, _residual_difference(run.tucker, source, layer))


def _residual_difference(tucker: TuckerCheckpoint, source: SourceModel, layer: int) -> float:
    """Largest |measured − recorded| relative residual of a layer's stacks."""
    largest = 0.0
    for group in range(tucker.manifest.groups):
        factors, kept = tucker.read_factors(layer, group), tucker.kept(layer, group)
        experts = group_experts(source.moe.shape, tucker.manifest.group_size, group)
        for recorded in tucker.manifest.stacks:
            if (recorded.layer, recorded.group) != (layer, group):
                continue
            if math.isnan(recorded.relative_residual):  # it was trained since
                continue
            stack_EHI = source.stack(layer, recorded.projection, experts)
            measured = relative_residual(
                stack_EHI, factors[recorded.projection], kept and kept.places_EK
            )
            largest = max(largest, abs(measured - recorded.relative_residual))
    return largest


def _verdict(
    run: Verification,
    layer: int,
    *,
    faults: Sequence[str],
    sharding_error: float | None,
    against: _AgainstSource | None,
    max_output_error: float | None,
) -> LayerVerdict:
    failures = list(faults)
    if sharding_error is not None and not sharding_error <= run.tolerance:
        failures.append(
            f"sharded output differs from unsharded by {sharding_error:.1e}, "
            f"allowed {run.tolerance:.0e}"
        )
    if against and not against.residual_difference <= RESIDUAL_TOLERANCE:
        failures.append(
            f"a residual differs from the recorded one by {against.residual_difference:.1e}, "
            f"allowed {RESIDUAL_TOLERANCE:.0e}"
        )
    if against and max_output_error is not None and not against.output_error <= max_output_error:
        failures.append(f"output error {against.output_error:.3g} is above {max_output_error:g}")
    warnings = worse_than_nothing(run.tucker.manifest, layer)
    if is_worse_on_text(run.tucker.manifest, layer):
        failures += [f"{cause}; calibrate with more text" for cause in warnings]
        warnings = []
    if against and not against.output_error <= 1:
        warnings.append(
            f"the output error on random tokens is {against.output_error:.3g}: zeros would have 1"
        )
    recorded = [s.relative_residual for s in run.tucker.manifest.stacks if s.layer == layer]
    return LayerVerdict(
        layer=layer,
        sharding_error=sharding_error,
        output_error=against.output_error if against else None,
        residual_recorded=None if math.isnan(max(recorded)) else max(recorded),
        residual_difference=against.residual_difference
        if against and not math.isnan(max(recorded))
        else None,
        failures=tuple(failures),
        warnings=tuple(warnings),
    )


def _nan_last(value: float) -> float:
    """Order errors so that NaN counts as the largest."""
    return math.inf if math.isnan(value) else value

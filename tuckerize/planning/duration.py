"""Time that work will take, as a range: its products at the rate of a GEMM that is measured now.

`benchmarks/durations.py` measures what a run takes in units of its products, at several widths; the
range holds those figures. It is of this CPU as busy as it is now, and of one process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import cache

import torch

from tuckerize.calibration.calibration_pass import CalibrationPass
from tuckerize.calibration.group_statistics import ELIMINATED_EXPERTS
from tuckerize.calibration.layer_profile import LayerProfile
from tuckerize.calibration.probes import num_probe_windows
from tuckerize.calibration.profile_pass import is_profiled, profile_model
from tuckerize.calibration.refine import batch_and_steps
from tuckerize.calibration.spectra import column_step
from tuckerize.compression.target import CompressionTarget, LayerPiece
from tuckerize.domain import DOWN, Coupling, MultilinearRank, Size
from tuckerize.planning.calibrated_memory import LayerWork
from tuckerize.planning.plan import CopyPiece, Piece, Plan
from tuckerize.progress import Progress
from tuckerize.recipe import CalibrationSettings
from tuckerize.report.plans import Duration

# Smallest and largest time of a run over that of its products; see benchmarks/durations.py.
_TIMES_PRODUCTS = (0.8, 3.0)
# Imports, and what small matrices take beside their products, at most.
_START_SECONDS = 15.0

# A symmetric product costs little more than half of a full one, see linalg/gram.py.
_GRAM_SHARE = 0.55
# Sweeps that a run is likely to make; HOOI has usually converged after a few.
_LIKELY_SWEEPS = 3
# Copying and hashing, a cautious figure for one core and one disk.
_COPY_BYTES_PER_SECOND = 3e8
# Runs that are expected to be shorter are not announced.
_ANNOUNCED_SECONDS = 60.0


def duration(operations: float, copied_bytes: float = 0.0) -> Duration:
    """Time of some work, as a range.

    Args:
        operations: Floating-point operations of its products.
        copied_bytes: Bytes that are copied and hashed beside them.
    """
    rate = product_rate()
    products, copied = operations / rate, copied_bytes / _COPY_BYTES_PER_SECOND
    least, most = (times * products + copied for times in _TIMES_PRODUCTS)
    return Duration(least, most + _START_SECONDS, rate, _TIMES_PRODUCTS)


def announce(expected: Duration, what: str, device: torch.device, progress: Progress) -> None:
    """Tell the user before the work, unless it is short; the range is of the CPU."""
    if expected.most >= _ANNOUNCED_SECONDS and device.type == "cpu":
        progress.note(f"{what} takes {expected.text}")


def profiles_of(
    calibration: CalibrationPass, progress: Progress, *, spectra: bool = True
) -> Sequence[LayerProfile]:
    """Profiles of all layers, from the cache or from a pass that is announced.

    Args:
        calibration: The model and its text.
        progress: Shows how far the pass is.
        spectra: Whether modes may be truncated.
    """
    if not is_profiled(calibration, spectra=spectra):
        expected = duration(profile_work(calibration, spectra=spectra))
        announce(expected, "the profile", calibration.model.device, progress)
    return profile_model(calibration, progress, spectra=spectra)


def plan_duration(plan: Plan) -> Duration:
    """Time of carrying out a plan in one process, without its profile."""
    operations = sum(work(plan, piece) for piece in plan.layer_pieces)
    return duration(operations, plan.source.checkpoint.bytes)


def training_work(
    size: Size, *, active_share: float, tokens: int, judged: int, forwards: int
) -> float:
    """Floating-point operations of training a model.

    Args:
        size: Size of the model.
        active_share: Share of the routed parameters that a token meets.
        tokens: Tokens of all steps.
        judged: Tokens that are only predicted: of all validations.
        forwards: Forwards and their like of a step: 3 with the backward, 4 with recomputation.
    """
    fixed = size.total_parameters - size.routed_parameters
    active = fixed + active_share * size.routed_parameters
    return 2.0 * active * (forwards * tokens + judged)


def work(plan: Plan, piece: Piece) -> float:
    """Floating-point operations of a piece, roughly; copies count as little as they take."""
    if isinstance(piece, CopyPiece):
        ranges = plan.source.checkpoint.files[piece.source_file].tensors.values()
        return float(sum(place.header.bytes for place in ranges))
    if piece.calibration is not None:
        return _calibrated_work(plan, piece, piece.calibration)
    return sum(
        _hooi_work(plan, target, coupling)
        for target in piece.targets
        for coupling in target.couplings
    )


def _hooi_work(plan: Plan, target: CompressionTarget, coupling: Coupling) -> float:
    """Floating-point operations of decomposing the coupled stacks of one group, roughly."""
    experts, rows, columns = shape = plan.group_shape
    rank = target.ranks[coupling]
    if target.tolerance is not None:  # all three modes may be truncated
        rank = MultilinearRank(max(1, experts // 2), rows // 2, columns // 2)
    per_value = 2.0
    for size, truncated in zip(shape, rank, strict=True):
        if truncated < size:
            per_value += 2 * (size * _GRAM_SHARE + truncated)
    several = len(rank.truncated_modes(shape)) > 1
    sweeps = 1 + (min(_LIKELY_SWEEPS, plan.recipe.max_sweeps) if several else 0)
    # The explicit residual multiplies once more.
    per_value = per_value * sweeps + 2 * (rank.hidden + rank.intermediate)
    return per_value * shape.parameters * len(coupling)


def _calibrated_work(plan: Plan, piece: LayerPiece, settings: CalibrationSettings) -> float:
    """Floating-point operations of calibrating and compressing a layer, roughly."""
    experts, neurons, hidden = shape = plan.source.moe.shape
    top_k = plan.source.moe.routing.top_k
    routed = settings.tokens * top_k
    rows = experts * LayerWork(shape, settings.tokens, settings.window, top_k).tokens_of_expert
    layer = 2.0 * 3 * neurons * hidden
    # Moments and their refit, two forwards of the tokens of all experts, and two of the layer.
    total = rows * (2.0 * (hidden**2 + 3 * neurons**2) + 2 * layer) + routed * 2 * layer
    # Elimination: in float64, half as fast, the inverse and its updates; products of down's rows.
    total += experts * (2 * 3.0 * neurons**3 + 2 * neurons**2 * hidden)
    gate_rank = next(iter(piece.targets[0].ranks.values()))
    if gate_rank.hidden < hidden:
        sweep = experts * 30 * 4.0 * hidden**2 * gate_rank.hidden
        total += min(_LIKELY_SWEEPS, plan.recipe.max_sweeps) * sweep
    # Forward and backward of one batch per step.
    batch, steps = batch_and_steps(settings.tokens, settings.refine)
    total += steps * batch * top_k * 3 * layer
    if piece.cores is not None:
        width, down_rank = piece.targets[0].neurons, piece.targets[0].ranks[DOWN]
        total += experts * _rounding_work(2 * width, gate_rank.hidden)
        total += experts * _rounding_work(down_rank.hidden, width)
    return total + _rest_of_layer(plan.source.size, len(plan.source.moe.layers)) * settings.tokens


def _rounding_work(outputs: int, inputs: int) -> float:
    """Operations of GPTQ and of the fit of scales, as measured at 7168 inputs."""
    return inputs**2 * (1.2 * inputs + 11.0 * outputs)


def profile_work(calibration: CalibrationPass, *, spectra: bool = True) -> float:
    """Floating-point operations of the profile of a model, roughly.

    Args:
        calibration: The model and its text.
        spectra: Whether modes may be truncated.
    """
    moe, settings = calibration.source.moe, calibration.settings
    experts, neurons, hidden = moe.shape
    tokens, layers = calibration.windows_SL.numel(), len(moe.layers)
    # Each layer makes two probes, which go through all that follow.
    probed = num_probe_windows(layers) * settings.window * (2 + layers)
    layer = 2.0 * 3 * neurons * hidden
    top_k = moe.routing.top_k
    total = tokens * (2 * hidden**2 + 2 * top_k * layer) + probed * top_k * layer
    # Some experts, with all that they are fitted to: moments, elimination, truncated inputs.
    some = min(experts, ELIMINATED_EXPERTS)
    rows = some * LayerWork(moe.shape, tokens, settings.window, top_k).tokens_of_expert
    total += rows * (layer + 2 * _GRAM_SHARE * neurons**2)
    total += some * (2 * 3.0 * neurons**3 + 2 * neurons**2 * hidden)
    if spectra:
        total += rows * (2 * layer + 6 * _GRAM_SHARE * neurons**2)
        columns = hidden // column_step(moe.shape)
        total += experts * neurons * hidden * 4.0 * (_GRAM_SHARE * hidden + columns)
        total += experts * neurons**2 * columns * 6 * _GRAM_SHARE
        # Eigenvalues and vectors of some ten (I, I) matrices, in float64.
        total += 10 * 2 * 9.0 * hidden**3
    total += _rest_of_layer(calibration.source.size, layers) * (tokens + probed)
    return total * layers


def _rest_of_layer(size: Size, layers: int) -> float:
    """Operations per token of what is not routed, by layer with routed experts."""
    return 2.0 * (size.total_parameters - size.routed_parameters) / layers


@cache
def product_rate() -> float:
    """Operations per second of a float32 product of 1024 x 1024 matrices, the best of three."""
    matrix = torch.ones(1024, 1024)
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        best = min(best, time.perf_counter() - start)
    return 2 * 1024.0**3 / best

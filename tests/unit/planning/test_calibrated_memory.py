"""Estimates of the parts of a calibrated layer's memory against what the system measures."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.expert_cases import SWIGLU, make_group, make_tokens
from tests.live_tensors import live_bytes
from tuckerize.calibration.group_statistics import GroupStatistics
from tuckerize.calibration.refine import refine
from tuckerize.calibration.tokens import DenseGroup, LayerTokens, StacksOnDisk
from tuckerize.compression.closed_form import factor_gate_up, refit, with_neurons
from tuckerize.compression.factors import GroupFactors
from tuckerize.compression.target import CompressionTarget, LayerPiece
from tuckerize.domain import DOWN, GATE_UP, CoreType, MultilinearRank, Projection, StackShape
from tuckerize.linalg.quantise import quantise
from tuckerize.linalg.selection import all_neurons, kept_neurons
from tuckerize.linalg.sharing import ALONE
from tuckerize.planning.calibrated_memory import LayerWork
from tuckerize.planning.closed_form_memory import closed_form_values
from tuckerize.progress import silent
from tuckerize.recipe import CalibrationSettings
from tuckerize.runtime.experts import TuckerExperts

STATUS = Path("/proc/self/status")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
_MMAP_THRESHOLD = -3  # of mallopt


def peak_bytes(work: Callable[[], object]) -> int:
    """Memory that some work takes at most, beside what there is before it.

    The less of two runs: libraries keep buffers after the first, whose sizes are the processor's.
    """

    def read(name: str) -> int:
        lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return int(lines[name].split()[0]) * 1024

    # Every larger tensor is given back at once.
    library = ctypes.CDLL(None)
    library.mallopt(_MMAP_THRESHOLD, 65536)

    def run() -> int:
        library.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = read("VmRSS")
        work()
        return read("VmHWM") - before

    return min(run(), run())


def on_disk(group: DenseGroup) -> DenseGroup:
    def read(projection: Projection, experts: range) -> torch.Tensor:
        return group.stacks[projection][experts.start : experts.stop]

    return DenseGroup(StacksOnDisk(read, group.experts, group.shape), group.experts)


def layer(shape: StackShape, count: int) -> tuple[DenseGroup, LayerTokens, LayerWork]:
    tokens = make_tokens(count, shape.hidden, shape.experts)
    return make_group(shape), tokens, LayerWork(shape, count, 512, 2)


@pytest.mark.parametrize(
    ("shape", "count"), [(StackShape(6, 768, 1024), 512), (StackShape(2, 512, 1024), 8192)]
)
def test_memory_of_moments_and_elimination(shape: StackShape, count: int) -> None:
    group, tokens, work = layer(shape, count)
    sums = 4 * (2 * shape.hidden**2 + tokens.x_TI.numel())  # moments of the layer, its output
    found = peak_bytes(lambda: GroupStatistics.gather(on_disk(group), tokens, activation=SWIGLU))
    assert found == pytest.approx(work.moments + sums, rel=0.4)


def test_memory_of_a_layer_forward() -> None:
    group, tokens, work = layer(StackShape(8, 512, 1024), 4096)
    module = TuckerExperts([group.as_tensors()], group_size=8, activation=SWIGLU)
    module(*tokens.part(slice(0, 8)))
    assert peak_bytes(lambda: module(*tokens)) == pytest.approx(work.forward, rel=0.4)


@pytest.mark.parametrize(("neurons", "hidden"), [(256, 2048), (1024, 1024)])
def test_memory_of_rounding_an_expert(neurons: int, hidden: int) -> None:
    """The first spends it on GPTQ, the second on the fit of scales."""
    group, tokens, work = layer(StackShape(1, neurons, hidden), 16)

    def work_on() -> None:
        both = torch.cat([group.stacks[projection] for projection in GATE_UP], dim=1)
        quantise(both, CoreType.W4, [tokens.x_TI.T @ tokens.x_TI])

    assert live_bytes(work_on) == pytest.approx(work.rounding(neurons), rel=0.25)


def test_what_is_freed_does_not_count() -> None:
    def work() -> None:
        for _ in range(3):
            one = torch.ones(1000)
            other = one.view(10, 100) + 1  # a view is nothing of its own
            del one
        del other

    assert live_bytes(work) == 3 * 4000


SIZES = StackShape(24, 88, 128)


def target_of(neurons: int, *rank: int) -> CompressionTarget:
    ranks = dict.fromkeys([GATE_UP, DOWN], MultilinearRank(*rank))
    return CompressionTarget(neurons, ranks, equal_widths=True)


TARGETS = {
    "neurons": target_of(48, 24, 48, 128),
    "hidden mode": target_of(88, 24, 88, 80),
    "both": target_of(64, 24, 64, 96),
    "all modes": target_of(88, 12, 56, 96),
    "expert mode": target_of(88, 12, 88, 128),
}


@pytest.mark.parametrize("name", TARGETS)
def test_values_of_the_closed_form_are_those_alive(name: str) -> None:
    group, tokens, work = layer(SIZES, 256)
    target = TARGETS[name]
    kept_EH = torch.arange(SIZES.intermediate).expand(SIZES.experts, -1) < target.neurons

    def work_on() -> None:
        own = GroupFactors.of(0, group, target)
        if target.neurons < SIZES.intermediate:
            own = with_neurons(own, kept_neurons(kept_EH))
        own = factor_gate_up(own, tokens, ALONE, max_sweeps=2, stage=silent)
        refit(own, tokens, ALONE, activation=SWIGLU, max_sweeps=2)

    expected = 4 * closed_form_values(SIZES, target, work.fitted_rows(target))
    assert live_bytes(work_on) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("name", TARGETS)
def test_values_of_refinement_are_those_alive(name: str) -> None:
    group, tokens, work = layer(SIZES, 256)
    target = TARGETS[name]
    own = GroupFactors.of(0, group, target)
    if target.neurons < SIZES.intermediate:
        own = with_neurons(own, all_neurons(SIZES._replace(intermediate=target.neurons)))
    own = factor_gate_up(own, tokens, ALONE, max_sweeps=0, stage=silent)
    tensors = refit(own, tokens, ALONE, activation=SWIGLU, max_sweeps=0).tensors()
    held_out = tokens.part(slice(0, 16))

    def work_on() -> None:
        copied = {name: tensor.clone() for name, tensor in tensors.items()}
        module = TuckerExperts([copied], group_size=SIZES.experts, activation=SWIGLU)
        refine(module, tokens, held_out, lambda part: torch.ones_like(part.x_TI), steps=2)

    settings = CalibrationSettings(texts=("text",), refine=2)
    expected = 4 * work.refinement(LayerPiece(0, (target,), settings))
    assert live_bytes(work_on) == pytest.approx(expected, rel=0.15)

"""Our HOOI against a textbook ST-HOSVD on one stack, alternating in one process.

    python -m benchmarks.linalg.st_hosvd --write

The textbook takes full Gram matrices of unfoldings in memory, expert mode first, and
`torch.linalg.eigh`. `--pyttb` adds the ST-HOSVD of pyttb (`pip install pyttb`), which is in
float64. Seconds depend on the machine and its load, the ratio hardly does.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuckerize.domain import MultilinearRank, StackShape
from tuckerize.linalg.hooi import hooi
from tuckerize.linalg.tensorly_engine import tensorly_tucker
from tuckerize.linalg.tucker import TuckerFactors, relative_residual

RESULTS = Path(__file__).parents[1] / "results" / "st_hosvd.json"
EXPERTS, INTERMEDIATE, HIDDEN = 64, 1408, 2048
SIGNAL_SHARE = math.sqrt(0.3)  # of the norm


@dataclass(frozen=True, slots=True)
class Row:
    """Times and residual of one method."""

    method: str
    shape: tuple[int, ...]
    rank: tuple[int, ...]
    seconds: tuple[float, ...]
    relative_residual: float


def main() -> None:
    """Run, print, and write where asked."""
    options = _options()
    torch.set_num_threads(options.threads)
    others = {"pyttb, ST-HOSVD": pyttb_st_hosvd} if options.pyttb else {}
    rows = _compare(_shape(options.divide), options.runs, others, sweep_runs=options.sweep_runs)
    if options.tensorly:
        rows += _compare_tensorly(_shape(options.tensorly_divide))
    rate = _product_rate()
    _print(rows, rate)
    if options.write:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(_report(rows, rate), indent=2) + "\n")


def plain_st_hosvd(stack_EHI: Tensor, rank: MultilinearRank) -> TuckerFactors:
    """Textbook ST-HOSVD: unfold, full Gram matrix, eigenvectors, project; mode after mode."""
    projected = stack_EHI
    factors = []
    for mode, size in enumerate(rank):
        unfolding = projected.movedim(mode, 0).flatten(1)
        factor = torch.linalg.eigh(unfolding @ unfolding.T)[1][:, -size:]
        sizes = projected.movedim(mode, 0).shape[1:]
        projected = (factor.T @ unfolding).view(size, *sizes).movedim(0, mode)
        factors.append(factor)
    return TuckerFactors(projected.contiguous(), *factors)


def pyttb_st_hosvd(stack_EHI: Tensor, rank: MultilinearRank) -> TuckerFactors:
    """ST-HOSVD of the Python Tensor Toolbox of Sandia, where TuckerMPI is from too."""
    pyttb: Any = importlib.import_module("pyttb")
    found = pyttb.hosvd(pyttb.tensor(stack_EHI.numpy()), tol=0.0, verbosity=-1, ranks=[*rank])
    core, *factors = (
        torch.from_numpy(part).float() for part in (found.core.double(), *found.factor_matrices)
    )
    return TuckerFactors(core.contiguous(), *factors)


def planted_stack(shape: StackShape, rank: MultilinearRank) -> Tensor:
    """Structure of the multilinear rank under noise that leaves a residual of 0.78."""
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(rank, generator=generator)
    for mode, size in enumerate(shape):
        factor = torch.randn((size, rank[mode]), generator=generator) / math.sqrt(size)
        stack = torch.tensordot(factor, stack.movedim(mode, 0), dims=1).movedim(0, mode)
    noise = torch.randn(shape, generator=generator)
    noise *= math.sqrt(1 - SIGNAL_SHARE**2) / noise.norm()
    return noise.add_(stack, alpha=SIGNAL_SHARE / float(stack.norm()))


def useful_flops(shape: StackShape, rank: MultilinearRank) -> float:
    """Multiplications and additions of ST-HOSVD with symmetric Gram matrices, n³·4/3 an eigh."""
    sizes, flops = list(shape), 0.0
    for mode, size in enumerate(rank):
        numbers = math.prod(sizes)
        flops += numbers * sizes[mode] + 2 * numbers * size + 4 / 3 * sizes[mode] ** 3
        sizes[mode] = size
    return flops


def _shape(divisor: int) -> StackShape:
    return StackShape(EXPERTS, INTERMEDIATE // divisor, HIDDEN // divisor)


def _compare(
    shape: StackShape,
    runs: int,
    others: Mapping[str, Callable[[Tensor, MultilinearRank], TuckerFactors]],
    *,
    sweep_runs: int,
) -> list[Row]:
    rank = MultilinearRank(*(size // 2 for size in shape))
    stack = planted_stack(shape, rank)
    methods: dict[str, Callable[[], TuckerFactors]] = {
        "plain ST-HOSVD": lambda: plain_st_hosvd(stack, rank),
        "hooi, 0 sweeps": lambda: hooi([stack], rank, max_sweeps=0).tensors[0],
        "hooi, 1 sweep": lambda: hooi([stack], rank, max_sweeps=1).tensors[0],
        **{name: partial(decompose, stack, rank) for name, decompose in others.items()},
    }
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    residuals: dict[str, float] = {}
    for run in range(runs):
        for method, decompose in methods.items():
            if "1 sweep" in method and run >= sweep_runs:
                continue
            elapsed, tucker = _timed(decompose)
            seconds[method].append(elapsed)
            if method not in residuals:
                residuals[method] = relative_residual(stack, tucker)
    return [Row(m, tuple(shape), tuple(rank), tuple(seconds[m]), residuals[m]) for m in methods]


def _compare_tensorly(shape: StackShape) -> list[Row]:
    rank = MultilinearRank(*(size // 2 for size in shape))
    stack = planted_stack(shape, rank)
    rows = []
    for method, decompose in {"hooi, 1 sweep": hooi, "TensorLy, 1 sweep": tensorly_tucker}.items():
        start = time.perf_counter()
        (tucker,) = decompose([stack], rank, max_sweeps=1).tensors
        elapsed = time.perf_counter() - start
        residual = relative_residual(stack, tucker)
        rows.append(Row(method, tuple(shape), tuple(rank), (elapsed,), residual))
    return rows


def _timed(decompose: Callable[[], TuckerFactors]) -> tuple[float, TuckerFactors]:
    start = time.perf_counter()
    tucker = decompose()
    return time.perf_counter() - start, tucker


def _product_rate() -> float:
    """Flops a second of a float32 product of 2048 square matrices: the best of five."""
    size = 2048
    left, right = torch.randn(size, size), torch.randn(size, size)
    product = torch.empty(size, size)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(left, right, out=product)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def _share_of_rate(row: Row, rate: float) -> float | None:
    if row.method != "hooi, 0 sweeps":
        return None
    flops = useful_flops(StackShape(*row.shape), MultilinearRank(*row.rank))
    return flops / min(row.seconds) / rate


def _print(rows: list[Row], rate: float) -> None:
    print(f"{'method':20}{'shape':16}{'min s':>8}{'median s':>10}{'residual':>10}{'ratio':>8}")
    base = rows[0]
    for row in rows:
        same = row.shape == base.shape
        ratio = f"{min(row.seconds) / min(base.seconds):8.2f}" if same else ""
        print(
            f"{row.method:20}{'x'.join(map(str, row.shape)):16}{min(row.seconds):8.2f}"
            f"{statistics.median(row.seconds):10.2f}{row.relative_residual:10.5f}{ratio}"
        )
    print(f"matrix products: {rate / 1e9:.0f} Gflop/s, {torch.get_num_threads()} threads")
    for row in rows:
        share = _share_of_rate(row, rate)
        if share is not None:
            print(f"{row.method}: {share:.0%} of that, useful flops only")


def _report(rows: list[Row], rate: float) -> dict[str, object]:
    base = rows[0]
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "product_gflops": rate / 1e9,
        "ratio_to_plain": {
            row.method: min(row.seconds) / min(base.seconds)
            for row in rows[1:]
            if row.shape == base.shape
        },
        "rows": [asdict(row) | {"share_of_rate": _share_of_rate(row, rate)} for row in rows],
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--sweep-runs", type=int, default=1, help="runs with one sweep")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--divide", type=int, default=1, help="take H and I this much smaller")
    parser.add_argument("--pyttb", action="store_true", help="add pyttb, which must be installed")
    parser.add_argument("--tensorly", action="store_true", help="add TensorLy with one sweep")
    parser.add_argument("--tensorly-divide", type=int, default=4, help="as --divide, for TensorLy")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Products of 16-bit matrices on this CPU, in milliseconds of one thread: ways to make them.

    python -m benchmarks.products

The matrix is that of an expert of DeepSeek-V2-Lite, 1408 x 2048 in bfloat16.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from tuckerize.runtime.grouped import gemm

RUNS = 5
WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ours": gemm,
    "float32": lambda rows, matrix: (rows.float() @ matrix.float()).bfloat16(),
    "rows @ matrix": torch.matmul,
    "transposed copy": lambda rows, matrix: rows @ matrix.mT.contiguous().mT,
    "einsum": lambda rows, matrix: torch.einsum("nx,xy->ny", rows, matrix),
    "bmm": lambda rows, matrix: torch.bmm(rows[None], matrix[None])[0],
}


def milliseconds(product: Callable[[Tensor, Tensor], Tensor], *operands: Tensor) -> float:
    """Processor time, the least of some runs."""
    product(*operands)
    found = []
    for _ in range(RUNS):
        started = time.process_time()
        product(*operands)
        found.append(time.process_time() - started)
    return 1000 * min(found)


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"capability {torch.backends.cpu.get_cpu_capability()}")
    matrix = torch.randn(1408, 2048).bfloat16()
    columns = matrix.mT.contiguous().mT
    for count in (1, 2, 6, 48):
        rows = torch.randn(count, 1408).bfloat16()
        times = [f"{name} {milliseconds(way, rows, matrix):.2f}" for name, way in WAYS.items()]
        times.append(f"ours by columns {milliseconds(gemm, rows, columns):.2f}")
        print(f"{count:3} rows: {', '.join(times)}")


if __name__ == "__main__":
    main()

"""Where tokens and their experts are, against counting one by one."""

from __future__ import annotations

import pytest
import torch

from tuckerize.domain import StackShape
from tuckerize.parallel.layouts import LayerShape, Parallelism
from tuckerize.pipeline.verify.traffic import load_of

SHAPE = StackShape(2, 4, 4)  # of each of four groups
SIZES = LayerShape([{}] * 4, SHAPE, joint=False)


@pytest.mark.parametrize(("ep", "cp"), [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_load_counts_copies_and_rows_that_leave_their_process(ep: int, cp: int) -> None:
    tokens, top_k = 16, 3
    generator = torch.Generator().manual_seed(0)
    experts_Tk = torch.rand(tokens, 8, generator=generator).topk(top_k).indices
    load = load_of(experts_Tk, SIZES, Parallelism(ep=ep, cp=cp))
    # With cp 2 the first process of cp has the outer chunks of four, the second the inner ones.
    chunks = [range(tokens)] if cp == 1 else [[*range(4), *range(12, 16)], range(4, 12)]
    copies = remote = 0
    for chunk in chunks:
        share = len(chunk) // ep
        for place, token in enumerate(chunk):
            owners = [expert // (8 // ep) for expert in experts_Tk[token].tolist()]
            away = [owner for owner in owners if owner != place // share]
            copies += len(set(away))
            remote += len(away)
    assert load.top_k == top_k
    assert load.copies == pytest.approx(copies / tokens)
    assert load.remote == pytest.approx(remote / tokens)
    rows = [int(((experts_Tk // 2) == group).sum()) / tokens for group in range(4)]
    assert list(load.rows) == pytest.approx(rows)
    assert sum(load.rows) == pytest.approx(top_k)

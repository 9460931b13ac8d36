"""Bytes of the tensors that are alive while some work is done, counted and not sampled.

Workspaces inside of torch's functions are not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Live(TorchDispatchMode):
    """Notes the storage of every new tensor, and the largest sum of those that are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.total = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        result = func(*args, **(kwargs or {}))
        known = {_place(own) for own in tree_leaves((args, kwargs)) if isinstance(own, Tensor)}
        for own in tree_leaves(result):
            if isinstance(own, Tensor) and _place(own) not in known:
                self._add(own)
        if self.total > self.peak:
            self._forget()
            self.peak = max(self.peak, self.total)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        before = self._storages.get(_place(tensor))
        if before is not None:
            self.total -= before[1]
        self._storages[_place(tensor)] = (StorageWeakRef(storage), storage.nbytes())  # type: ignore[no-untyped-call]
        self.total += storage.nbytes()

    def _forget(self) -> None:
        gone = [place for place, (own, _) in self._storages.items() if own.expired()]  # type: ignore[no-untyped-call]
        self.total -= sum(self._storages.pop(place)[1] for place in gone)


def _place(tensor: Tensor) -> int:
    place: int = tensor.untyped_storage()._cdata
    return place


def live_bytes(work: Callable[[], object]) -> int:
    """Largest sum of the bytes of tensors that some work makes, beside those from before it."""
    live = _Live()
    with live:
        work()
    return live.peak

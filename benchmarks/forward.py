"""Tokens a second of Tucker experts against transformers' dense ones, a layer and a whole model.

    python -m benchmarks.forward --threads 2 --write

Real sizes of DeepSeek-V2-Lite (64 experts of 1408 x 2048, top 6), random weights: what a product
takes does not depend on them. All contestants alternate in one process, the least of some runs
counts, and a ratio is that of tokens a second to the fastest dense implementation's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DeepseekV2ForCausalLM
from transformers.cache_utils import DynamicCache

import tuckerize
from benchmarks.full_width import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, lite_config
from tuckerize.domain import MultilinearRank, Projection
from tuckerize.format.config import GroupShape
from tuckerize.moe.family import Glu
from tuckerize.runtime.activations import activation_of
from tuckerize.runtime.experts import TuckerExperts

CAPABILITY = torch.backends.cpu.get_cpu_capability()
RESULTS = Path(__file__).parent / "results" / f"forward_{CAPABILITY.lower()}.json"
DENSE = ("eager", "batched_mm", "grouped_mm")
# Gathers the weights of every token's experts: for more tokens than this it is out of the question.
BATCHED_TOKENS = 32
KEEPS = (0.75, 0.5)
PROMPT = 128

Call = Callable[[], object]


class Shape(NamedTuple):
    """What is left of a layer: neurons of every expert, and r_I (HIDDEN if there is no factor)."""

    neurons: int
    rank: int

    @property
    def parameters(self) -> int:
        """Stored numbers: cores, the U_I of gate and up, and that of down."""
        factors = 0 if self.rank == HIDDEN else 2 * HIDDEN * self.rank
        return 3 * EXPERTS * self.neurons * self.rank + factors


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        what: `layer` or `model`.
        phase: `decode` (one token a sequence) or `prefill`.
        batch: Sequences.
        method: A dense implementation, or a shape and its keep.
        keep: Kept share of the routed parameters.
        tokens_per_second: Of the best run.
        ratio: To the fastest dense implementation in the same run.
    """

    what: str
    phase: str
    batch: int
    method: str
    keep: float
    tokens_per_second: float
    ratio: float


def shapes(keep: float) -> dict[str, Shape]:
    """Three ways to spend a budget: factors alone, neurons alone, half of its logarithm on each."""
    return {
        "latent": Shape(INTERMEDIATE, _rank(keep, INTERMEDIATE)),
        "neurons": Shape(_multiple(keep * INTERMEDIATE), HIDDEN),
        "both": Shape(
            _multiple(math.sqrt(keep) * INTERMEDIATE),
            _rank(keep, _multiple(math.sqrt(keep) * INTERMEDIATE)),
        ),
    }


def _rank(keep: float, neurons: int) -> int:
    budget = keep * 3 * EXPERTS * INTERMEDIATE * HIDDEN
    return _multiple(budget / (3 * EXPERTS * neurons + 2 * HIDDEN))


def _multiple(size: float) -> int:
    """The nearest size that a plan chooses from, where modes are this large."""
    return 128 * round(size / 128)


def tucker_experts(shape: Shape, dtype: torch.dtype) -> TuckerExperts:
    """A layer of a shape, gate and up with one U_I."""
    rank = MultilinearRank(EXPERTS, shape.neurons, shape.rank)
    ranks = dict.fromkeys(Projection, rank)
    group = GroupShape((shape.neurons,) * EXPERTS, ranks, joint=True)
    tensors = {
        name: torch.empty(sizes, dtype=dtype).normal_(std=0.02)
        for name, sizes in group.tensor_shapes(HIDDEN).items()
    }
    return TuckerExperts([tensors], group_size=EXPERTS, activation=activation_of(Glu()))


def dense_model(layers: int, dtype: torch.dtype) -> Any:  # noqa: ANN401
    """A DeepSeek-V2 of the real width with few layers, all of them of experts."""
    config = lite_config(layers, dense_layers=0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    model: Any = DeepseekV2ForCausalLM(config)
    torch.set_default_dtype(default)
    return model


def wait_for_device() -> None:
    """Let the accelerator finish, where the tensors of the contest are on one."""
    if torch.get_default_device().type != "cpu":
        torch.accelerator.synchronize()


def best_seconds(calls: Mapping[str, Call], runs: int) -> dict[str, float]:
    """Least seconds of every call, all of them in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(runs):
        for name, call in calls.items():
            wait_for_device()
            start = time.perf_counter()
            call()
            wait_for_device()
            seconds[name].append(time.perf_counter() - start)
    return {name: min(own) for name, own in seconds.items()}


class Contest:
    """The dense experts of a layer, and Tucker ones of every shape and keep, in its place."""

    def __init__(self, dtype: torch.dtype, layers: int) -> None:
        self.model = dense_model(layers, dtype)
        self.dense = [layer.mlp.experts for layer in self.model.model.layers]
        self.keeps = dict.fromkeys(DENSE, 1.0)
        self.tucker: dict[str, list[TuckerExperts]] = {}
        for keep in KEEPS:
            for name, shape in shapes(keep).items():
                method = f"{name} {keep:g}"
                self.tucker[method] = [tucker_experts(shape, dtype) for _ in range(layers)]
                self.keeps[method] = shape.parameters / (3 * EXPERTS * INTERMEDIATE * HIDDEN)

    def choose(self, method: str) -> None:
        """Put a method's experts into every layer."""
        if method in DENSE:
            self.model.config._experts_implementation = method
        experts: list[nn.Module] = self.dense if method in DENSE else [*self.tucker[method]]
        for layer, own in zip(self.model.model.layers, experts, strict=True):
            layer.mlp.experts = own

    def layer_calls(self, tokens: int, dtype: torch.dtype) -> dict[str, Call]:
        """Every method's first layer on so many tokens."""
        x_TI = torch.randn(tokens, HIDDEN).to(dtype)
        weights_Tk, experts_Tk = torch.rand(tokens, EXPERTS).softmax(1).topk(TOP_K)

        def call(method: str) -> Call:
            def run() -> Tensor:
                self.choose(method)
                output: Tensor = self.model.model.layers[0].mlp.experts(
                    x_TI, experts_Tk, weights_Tk.to(dtype)
                )
                return output

            return run

        return {method: call(method) for method in self._methods(tokens)}

    def prefill_calls(self, batch: int) -> dict[str, Call]:
        """The whole model on prompts."""
        tokens = torch.randint(0, 2048, (batch, PROMPT))

        def call(method: str) -> Call:
            def run() -> object:
                self.choose(method)
                return self.model(tokens, use_cache=False, logits_to_keep=1)

            return run

        return {method: call(method) for method in self._methods(batch * PROMPT)}

    def decode_calls(self, batch: int) -> dict[str, Call]:
        """The whole model on one more token a sequence, behind a prompt."""
        cache = DynamicCache(config=self.model.config)
        self.choose("grouped_mm")
        self.model(torch.randint(0, 2048, (batch, PROMPT)), past_key_values=cache)
        tokens = torch.randint(0, 2048, (batch, 1))

        def call(method: str) -> Call:
            def run() -> None:
                self.choose(method)
                self.model(tokens, past_key_values=cache)
                cache.crop(-1)

            return run

        return {method: call(method) for method in self._methods(batch)}

    def _methods(self, tokens: int) -> list[str]:
        return [m for m in self.keeps if m != "batched_mm" or tokens <= BATCHED_TOKENS]

    def rows(
        self, batches: Iterable[int], runs: int, dtype: torch.dtype, most_tokens: int
    ) -> Iterator[Row]:
        """Measure everything; prefill of at most so many tokens."""
        for batch in batches:
            prompts = batch * PROMPT
            yield from self._rows("layer", "decode", batch, self.layer_calls(batch, dtype), runs)
            yield from self._rows("model", "decode", batch, self.decode_calls(batch), runs)
            if prompts <= most_tokens:
                calls = self.layer_calls(prompts, dtype)
                yield from self._rows("layer", "prefill", batch, calls, runs)
                yield from self._rows("model", "prefill", batch, self.prefill_calls(batch), runs)

    def _rows(
        self, what: str, phase: str, batch: int, calls: Mapping[str, Call], runs: int
    ) -> Iterator[Row]:
        seconds = best_seconds(calls, runs)
        dense = min(seconds[method] for method in DENSE if method in seconds)
        tokens = batch * (PROMPT if phase == "prefill" else 1)
        for method, own in seconds.items():
            keep = round(self.keeps[method], 4)
            yield Row(what, phase, batch, method, keep, tokens / own, dense / own)


def _shown(rows: Iterable[Row]) -> Iterator[Row]:
    """The same rows, printed as they come."""
    print(f"{'':6} {'phase':8} {'batch':>5} {'method':14} {'keep':>5} {'tokens/s':>9} {'ratio':>6}")
    for row in rows:
        print(
            f"{row.what:6} {row.phase:8} {row.batch:5} {row.method:14} {row.keep:5.3f} "
            f"{row.tokens_per_second:9.1f} {row.ratio:6.2f}",
            flush=True,
        )
        yield row


def main() -> None:
    """Measure, print, and write the results if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="sequences")
    parser.add_argument(
        "--most-tokens", type=int, default=sys.maxsize, help="of prompts; larger ones are left out"
    )
    parser.add_argument("--layers", type=int, default=1, help="layers of the whole model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    with torch.inference_mode():
        contest = Contest(dtype, options.layers)
        measured = contest.rows(options.batches, options.runs, dtype, options.most_tokens)
        rows = list(_shown(measured))
    if options.write:
        about = {
            "torch": torch.__version__,
            "tuckerize": tuckerize.__version__,
            "machine": platform.machine(),
            "capability": CAPABILITY,
            "cores": os.cpu_count(),
            "threads": options.threads,
            "dtype": options.dtype,
            "layers": options.layers,
        }
        rounded = [asdict(row) | {"ratio": round(row.ratio, 3)} for row in rows]
        RESULTS.write_text(json.dumps(about | {"rows": rounded}, indent=1) + "\n")


if __name__ == "__main__":
    main()

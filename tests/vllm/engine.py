"""Run a checkpoint in vLLM and print what it generates, as JSON: a process of its own.

python tests/vllm/engine.py FOLDER [--tp 2] [--ep]
"""

from __future__ import annotations

import argparse
import json
import os
import sys

PROMPTS = [list(range(3, 30)), [40, 7, 22], [11] * 9]
NEW_TOKENS = 16

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_HOST_IP="127.0.0.1",
    VLLM_NO_USAGE_STATS="1",
)


def main() -> None:
    """Load, generate greedily, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--ep", action="store_true")
    options = parser.parse_args()
    if options.tp > 1:  # the workers share the cores of one NUMA node
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(options.tp)))
    from vllm import LLM, SamplingParams

    engine = LLM(
        options.folder,
        dtype="float32",
        enforce_eager=True,
        enable_expert_parallel=options.ep,
        max_model_len=64,
        skip_tokenizer_init=True,
        tensor_parallel_size=options.tp,
    )
    how = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": tokens} for tokens in PROMPTS]
    results = engine.generate(prompts, how)
    found = [list(result.outputs[0].token_ids) for result in results]
    sys.stdout.write(f"TOKENS {json.dumps(found)}\n")


if __name__ == "__main__":
    main()

"""The vLLM plugin, and what vllm-ascend asks of it."""

"""The vLLM plugin, also for vllm-ascend."""

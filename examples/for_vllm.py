"""Write the shipped model in the sizes that vLLM computes on a CPU.

    python examples/for_vllm.py FOLDER

vLLM 0.32.0 has latent attention on a CPU in DeepSeek's own sizes alone, and no tied embeddings of
DeepSeek-V2. The function stays exactly what it is: what is new in the weights are zeros and copies,
and queries are doubled, since softmax divides by the root of a size that is four times as large.
Routed experts are not touched.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
)

SHIPPED = Path(__file__).parent / "tiny-moe"
LATENT, NOPE, ROPE, VALUE = 512, 128, 64, 128


def main(folder: Path) -> None:
    """Write the model and its tokenizer."""
    old: Any = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype="auto")
    config = old.config.from_dict(
        {
            **old.config.to_dict(),
            "tie_word_embeddings": False,
            "n_group": 1,
            "topk_group": 1,
            "kv_lora_rank": LATENT,
            "qk_nope_head_dim": NOPE,
            "qk_rope_head_dim": ROPE,
            "v_head_dim": VALUE,
            "head_dim": ROPE,
            "qk_head_dim": NOPE + ROPE,
        }
    )
    weights = old.state_dict()
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}.self_attn"
        for key, tensor in attention(old.config, weights, name).items():
            weights[f"{name}.{key}.weight"] = tensor
    new: Any = DeepseekV2ForCausalLM(config).to(old.dtype)
    new.load_state_dict(weights)
    new.save_pretrained(folder)
    AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(folder)


def attention(config: DeepseekV2Config, weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Weights of one layer's attention in the new sizes."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    latent, value = config.kv_lora_rank, config.v_head_dim
    nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim

    def old(key: str) -> Tensor:
        return weights[f"{name}.{key}.weight"]

    # Of frequencies base^(-2i / rope) every 4th of the new ones is an old one, in pairs of numbers.
    pairs = torch.arange(rope).view(-1, 2)
    turned = (pairs[:, :1] * (ROPE // rope) + torch.arange(2)).flatten()
    query = old("q_proj").new_zeros(heads, NOPE + ROPE, hidden)
    scale = ((NOPE + ROPE) / (nope + rope)) ** 0.5
    own = old("q_proj").view(heads, nope + rope, hidden) * scale
    query[:, :nope], query[:, NOPE + turned] = own[:, :nope], own[:, nope:]
    down = query.new_zeros(LATENT + ROPE, hidden)
    own = old("kv_a_proj_with_mqa")
    copies = LATENT // latent  # of equal numbers the root mean square is the same
    down[:LATENT], down[LATENT + turned] = own[:latent].repeat(copies, 1), own[latent:]
    norm = old("kv_a_layernorm").repeat(copies)
    up = query.new_zeros(heads, NOPE + VALUE, LATENT)
    own = old("kv_b_proj").view(heads, nope + value, latent)
    up[:, :nope, :latent], up[:, NOPE : NOPE + value, :latent] = own[:, :nope], own[:, nope:]
    output = query.new_zeros(hidden, heads, VALUE)
    output[:, :, :value] = old("o_proj").view(hidden, heads, value)
    return {
        "q_proj": query.flatten(0, 1),
        "kv_a_proj_with_mqa": down,
        "kv_a_layernorm": norm,
        "kv_b_proj": up.flatten(0, 1),
        "o_proj": output.flatten(1),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))

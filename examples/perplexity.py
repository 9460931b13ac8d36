"""Measure the perplexity of a causal language model's folder on a text file.

From a checkout::

    python examples/perplexity.py examples/tiny-moe --text examples/held_out.txt

The text is encoded as one stream after a begin token, where the tokenizer has one. The stream is
cut into windows that do not overlap: window ``k`` reads tokens ``k * window`` up to
``(k + 1) * window - 1`` and predicts, for each of them, the one that follows. So every token of
the text is scored exactly once, the first of a window from the last token of the one before.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Perplexity:
    """What a model makes of a text.

    Attributes:
        tokens: How many tokens were scored.
        nll: Mean negative log-likelihood per token, in nats.
        perplexity: The exponential of ``nll``.
        bits_per_byte: Total negative log-likelihood in bits over the text's UTF-8 bytes.
    """

    tokens: int
    nll: float
    perplexity: float
    bits_per_byte: float


def _zero(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def silence_routed(model: nn.Module) -> int:
    """Makes the routed experts of every layer give zeros; shared experts are left alone.

    Args:
        model: A model whose layers keep their routed experts in a module named ``experts``.

    Returns:
        How many layers have routed experts.

    Raises:
        ValueError: No such layer was found.
    """
    stacks = [module for name, module in model.named_modules() if name.endswith(".experts")]
    for stack in stacks:
        stack.register_forward_hook(_zero)
    if not stacks:
        raise ValueError("the model has no module named 'experts'")
    return len(stacks)


@torch.no_grad()
def perplexity(
    model_dir: Path, text: str, *, window: int = 512, zero_routed: bool = False
) -> Perplexity:
    """Measures a model's perplexity on a text, computing in float32.

    Args:
        model_dir: Folder with the model and its tokenizer.
        text: The text to score.
        window: Tokens per window.
        zero_routed: Whether the routed experts' output is set to zero, to see what they do.

    Returns:
        The measurement.

    Raises:
        ValueError: The text is too short.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if zero_routed:
        silence_routed(model)
    tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if tokenizer.bos_token_id is not None:
        tokens.insert(0, tokenizer.bos_token_id)
    if len(tokens) < 2:
        raise ValueError("the text is too short to score a token")
    inputs, targets = torch.tensor(tokens[:-1]), torch.tensor(tokens[1:])
    total = 0.0
    for source, target in zip(
        torch.split(inputs, window), torch.split(targets, window), strict=True
    ):
        logits = model(input_ids=source[None], use_cache=False).logits[0].float()
        total += cross_entropy(logits, target, reduction="sum").item()
    nll = total / len(targets)
    bits = total / math.log(2) / len(text.encode())
    return Perplexity(len(targets), nll, math.exp(nll), bits)


def main() -> None:
    """Reads the options, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text file")
    parser.add_argument("--window", type=int, default=512, help="tokens per window")
    parser.add_argument("--zero-routed", action="store_true", help="silence the routed experts")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    text = args.text.read_bytes().decode("utf-8")
    result = perplexity(args.model_dir, text, window=args.window, zero_routed=args.zero_routed)
    if args.json:
        print(json.dumps(asdict(result)))
        return
    print(f"tokens         {result.tokens}")
    print(f"nll per token  {result.nll:.4f}")
    print(f"perplexity     {result.perplexity:.3f}")
    print(f"bits per byte  {result.bits_per_byte:.4f}")


if __name__ == "__main__":
    main()

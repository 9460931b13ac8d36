"""Train the example model from scratch on the CPU: a tiny DeepSeek-V2 that writes Python.

The text is the source of the standard library of the Python that runs this script. Whole files
are held out, written to ``held_out.txt`` and never trained on. From a checkout::

    python examples/train_tiny_moe.py

Everything is seeded: the same Python, library versions and thread count repeat the run.
"""

import argparse
import hashlib
import json
import math
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from tqdm import tqdm
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, PreTrainedTokenizerFast

try:
    from examples.fast_kernels import use_fast_kernels
except ModuleNotFoundError:  # run as a script, whose own folder is on the path
    from fast_kernels import use_fast_kernels  # type: ignore[import-not-found,no-redef]

HERE = Path(__file__).parent
TEST_BYTES = 180_000
"""Size of the held-out text; whole files are taken until it is reached."""
TEST_FILE_BYTES = (2_000, 40_000)
"""Smallest and largest file held out, so that the held-out text mixes many files."""
LEFT_OUT = ("site-packages", "encodings", "pydoc_data", "config-", "_sysconfigdata")
"""Starts of paths left out: third parties' code, generated tables, the build's own settings."""

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "num_attention_heads": 4,
}
"""The example model's sizes: three quarters of its parameters are routed experts."""


def read_corpus(root: Path) -> dict[str, str]:
    """Reads every ``.py`` file below the standard library's folder, text by relative path."""
    texts: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if relative.parts[0].startswith(LEFT_OUT):
            continue
        try:
            texts[relative.as_posix()] = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
    return texts


def hold_out(texts: Mapping[str, str], test_bytes: int) -> tuple[dict[str, str], dict[str, str]]:
    """Splits files by a hash of their names.

    Args:
        texts: Text by name.
        test_bytes: Files are held out until they have this size.

    Returns:
        The files to train on and the files held out. The held-out ones are the first by hash
        whose size lies in ``TEST_FILE_BYTES``.
    """
    held_out: dict[str, str] = {}
    size = 0
    for name in sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest()):
        file_size = len(texts[name].encode())
        if size < test_bytes and TEST_FILE_BYTES[0] <= file_size <= TEST_FILE_BYTES[1]:
            held_out[name] = texts[name]
            size += file_size
    return {name: text for name, text in texts.items() if name not in held_out}, held_out


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer, which gives every text back exactly."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|begin|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        pad_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], seed: int) -> Tensor:
    """Encodes files as one stream, in shuffled order, each between its begin and end tokens."""
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    batch = tokenizer.backend_tokenizer.encode_batch([texts[index] for index in order])
    return torch.tensor([token for item in batch for token in (begin, *item.ids, end)])


def build_model(
    tokenizer: PreTrainedTokenizerFast, scaling: float, spread: float, **sizes: int
) -> DeepseekV2ForCausalLM:
    """Builds the untrained model.

    Args:
        tokenizer: Gives the vocabulary's size and the special tokens.
        scaling: What the routers' weights are multiplied with.
        spread: Standard deviation of the initial weights.
        sizes: Entries of the configuration that differ from ``SIZES``.
    """
    config = DeepseekV2Config(
        **{**SIZES, **sizes},
        vocab_size=len(tokenizer),
        topk_method="greedy",
        routed_scaling_factor=scaling,
        q_lora_rank=None,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=spread,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return DeepseekV2ForCausalLM(config)


class RouterWatch:
    """Collects the routers' decisions of one forward pass and turns them into a balance loss."""

    def __init__(self, model: DeepseekV2ForCausalLM) -> None:
        """Hooks every router of the model."""
        self.seen: list[tuple[Tensor, Tensor]] = []
        for module in model.modules():
            if type(module).__name__ == "DeepseekV2TopkRouter":
                module.register_forward_hook(lambda _m, _i, out: self.seen.append((out[0], out[2])))

    def take(self) -> tuple[Tensor, Tensor]:
        """Gives the balance loss (1 when even) and each layer's share of choices per expert."""
        losses, loads = [], []
        for logits, index in self.seen:
            experts = logits.shape[-1]
            # No bincount: an accelerator's host would wait for it.
            load = one_hot(index.reshape(-1), experts).float().mean(0)
            losses.append(experts * (load * logits.float().softmax(-1).mean(0)).sum())
            loads.append(load)
        self.seen.clear()
        return torch.stack(losses).mean(), torch.stack(loads)


def batches(stream: Tensor, count: int, length: int, seed: int) -> Iterator[Tensor]:
    """Yields batches of sequences without end; every epoch starts at a new random offset."""
    generator = torch.Generator().manual_seed(seed)
    starts: list[int] = []
    while True:
        rows: list[Tensor] = []
        while len(rows) < count:
            if not starts:
                first = int(torch.randint(length, (1,), generator=generator))
                grid = torch.arange(first, len(stream) - length - 1, length)
                starts = grid[torch.randperm(len(grid), generator=generator)].tolist()
            start = starts.pop()
            rows.append(stream[start : start + length + 1])
        yield torch.stack(rows)


@torch.no_grad()
def evaluate(
    model: DeepseekV2ForCausalLM, watch: RouterWatch, stream: Tensor
) -> tuple[float, Tensor]:
    """Gives the loss per token on a stream and the experts' load, in windows of 512 tokens."""
    total, loads, windows = 0.0, [], stream.unfold(0, 513, 512)
    for rows in torch.split(windows, 8):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
        total += cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item() * len(rows)
        loads.append(watch.take()[1])
    return total / len(windows), torch.stack(loads).mean(0)


def train(
    model: DeepseekV2ForCausalLM,
    args: argparse.Namespace,
    feed: Callable[[int, int], Iterator[Tensor]],
    tests: Mapping[str, Tensor],
    publish: Callable[[], None] | None = None,
) -> dict[str, object]:
    """Trains the model in place and gives a record of the run.

    Args:
        model: The model.
        args: The options of ``add_options``.
        feed: Gives batches without end, for a length of the sequences and a seed.
        tests: Held-out streams by name.
        publish: Called after each checkpoint.
    """
    use_fast_kernels(model)
    watch = RouterWatch(model)
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    done, seen, average, before = 0, 0, math.nan, 0.0
    if args.resume:
        saved = torch.load(args.checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done, seen, average, before = saved["counts"]
    start = time.monotonic() - 60 * before
    short, long = (feed(length, args.seed + done) for length in (256, 512))
    bar = tqdm(total=args.steps, initial=done, mininterval=5)
    while True:
        minutes = (time.monotonic() - start) / 60
        progress = max(done / args.steps, minutes / args.minutes)
        if progress >= 1:
            break
        rows = next(short if progress < args.short_share else long)
        cosine = 0.05 + 0.475 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(cosine, (done + 1) / args.warmup)
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        balance, loads = watch.take()
        optimizer.zero_grad()
        (loss + args.balance * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done, seen = done + 1, seen + rows[:, 1:].numel()
        average = loss.item() if done == 1 else 0.98 * average + 0.02 * loss.item()
        busiest = f"{loads.min() * loads.shape[1]:.2f}-{loads.max() * loads.shape[1]:.2f}"
        bar.set_postfix(loss=f"{average:.3f}", load=busiest, refresh=False)
        bar.update()
        if done % args.save_every == 0:
            for name, stream in tests.items():
                bar.write(f"step {done}: {name} loss {evaluate(model, watch, stream)[0]:.4f}")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            counts = (done, seen, average, (time.monotonic() - start) / 60)
            unfinished = args.checkpoint.with_suffix(".unfinished")
            torch.save({**state, "counts": counts}, unfinished)
            unfinished.replace(args.checkpoint)
            if publish:
                publish()
    bar.close()
    results = {name: evaluate(model, watch, stream) for name, stream in tests.items()}
    return {
        "steps": done,
        "tokens": seen,
        "minutes": round(minutes, 1),
        "final_training_loss": round(average, 4),
        "loss": {name: round(loss, 4) for name, (loss, _) in results.items()},
        "load_times_even": {
            name: [[round(x * len(layer), 2) for x in layer] for layer in loads.tolist()]
            for name, (_, loads) in results.items()
        },
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the model's start and of its training."""
    parser.add_argument("--checkpoint", type=Path, default=Path("build/tiny-moe.pt"))
    parser.add_argument("--save-every", type=int, default=300, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--steps", type=int, default=2700)
    parser.add_argument("--minutes", type=float, default=math.inf, help="cool down by then")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per batch")
    parser.add_argument("--short-share", type=float, default=0.75, help="of 256 tokens, then 512")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--balance", type=float, default=1e-2, help="balance loss coefficient")
    parser.add_argument("--scaling", type=float, default=4.0, help="routed_scaling_factor")
    parser.add_argument("--spread", type=float, default=0.06, help="of the initial weights")
    parser.add_argument("--seed", type=int, default=0)


def main() -> None:
    """Reads the options, trains, and writes the model, its tokenizer and the held-out text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "tiny-moe")
    parser.add_argument("--held-out", type=Path, default=HERE / "held_out.txt")
    add_options(parser)
    args = parser.parse_args()

    torch.set_num_threads(2)
    torch.manual_seed(args.seed)
    texts, test = hold_out(read_corpus(Path(sysconfig.get_paths()["stdlib"])), TEST_BYTES)
    args.held_out.parent.mkdir(parents=True, exist_ok=True)
    parts = [f"# file: {name}\n{text}" for name, text in sorted(test.items())]
    args.held_out.write_bytes("".join(parts).encode())
    tokenizer = train_tokenizer(list(texts.values()), vocab_size=2048)
    tokenizer.save_pretrained(args.out)
    streams = [encode(tokenizer, list(part.values()), args.seed) for part in (texts, test)]
    print(f"{len(texts)} files, {len(streams[0])} tokens; held out {len(test)}, {len(streams[1])}")
    model = build_model(tokenizer, args.scaling, args.spread)

    def feed(length: int, seed: int) -> Iterator[Tensor]:
        return batches(streams[0], args.tokens // length, length, seed)

    record = train(model, args, feed, {"held-out": streams[1]})
    model.bfloat16().save_pretrained(args.out)
    print(json.dumps(record))


if __name__ == "__main__":
    main()

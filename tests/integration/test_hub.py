"""Transfers: a model is fetched from a server of the Hub's form, and what `push` would upload."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.running import run_here, succeed
from tests.tiny_models import add_tokenizer, make_tiny_model, write_text
from tuckerize import (
    DecomposeRequest,
    EvaluateRequest,
    PushRequest,
    ReconstructRequest,
    ReportRequest,
    decompose,
    evaluate,
    push,
    reconstruct,
    write_report,
)
from tuckerize.checkpoint.hub import download_model
from tuckerize.checkpoint.output import EVALUATION
from tuckerize.errors import CheckpointError

COMMIT = "0" * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model with a tokenizer and a card."""
    folder = add_tokenizer(make_tiny_model(tmp_path_factory.mktemp("hub") / "model"))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# The source\n", encoding="utf-8")
    return folder


@pytest.fixture
def server(model: Path) -> Iterator[str]:
    """A server that has the model as me/tiny; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            file = model / path.rpartition("/")[2]
            if path.startswith("/api/models/me/tiny/tree/"):
                entries = [
                    {"type": "file", "path": own.name, "size": own.stat().st_size, "oid": own.name}
                    for own in model.iterdir()
                ]
                content = json.dumps(entries).encode()
            elif path.startswith("/api/models/me/tiny"):
                siblings = [
                    {"rfilename": own.name, "size": own.stat().st_size}
                    for own in [*model.iterdir()]
                ]
                siblings.append({"rfilename": "pytorch_model.bin", "size": 10**15})
                value = {"id": "me/tiny", "sha": COMMIT, "siblings": siblings}
                content = json.dumps(value).encode()
            elif path.startswith("/me/tiny/resolve/") and file.exists():
                content = file.read_bytes()
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Keep quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def fetched(server: str, cache: Path, model: str) -> subprocess.CompletedProcess[str]:
    """Run plan with --download against a server."""
    words = ("plan", "--model", model, "--download", "--fit", "1GiB", "--json")
    environment = {"HF_ENDPOINT": server, "HF_HOME": str(cache), "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [sys.executable, "-m", "tuckerize", *words],
        env=environment,
        text=True,
        capture_output=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )


def test_model_is_fetched_with_its_progress(server: str, model: Path, tmp_path: Path) -> None:
    done = fetched(server, tmp_path / "cache", "me/tiny")
    assert done.returncode == 0, done.stderr
    folder = Path(json.loads(done.stdout)["model"])
    names = {path.name for path in model.iterdir()}
    assert {path.name for path in folder.iterdir()} == names  # without pytorch_model.bin
    assert all((folder / name).read_bytes() == (model / name).read_bytes() for name in names)
    assert "100%" in done.stderr


def test_model_that_cannot_be_fetched_is_named(server: str, tmp_path: Path) -> None:
    missing = fetched(server, tmp_path, "me/other")
    assert missing.returncode == 2
    assert "cannot fetch me/other" in missing.stderr
    assert "check the name" in missing.stderr
    unreachable = fetched("http://127.0.0.1:9", tmp_path, "me/tiny")
    assert unreachable.returncode == 2
    assert "check the network" in " ".join(unreachable.stderr.split())


@pytest.fixture(scope="module")
def tucker(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Tucker checkpoint whose comparison with its source is kept."""
    base = tmp_path_factory.mktemp("push")
    decompose(DecomposeRequest(model=model, output=base / "out", keep=0.5, quantize="w8"))
    text = write_text(base / "python.txt", 2000)
    evaluate(EvaluateRequest(model=base / "out", text=text, against=model, tokens=512, window=64))
    return base / "out"


def test_dry_run_shows_files_and_a_card_with_what_was_measured(tucker: Path) -> None:
    shards = succeed("shard", tucker, "--tp", "2")
    assert "tp2" in shards
    report = push(
        PushRequest(folder=tucker, repository="me/small", base_model="me/tiny", dry_run=True)
    )
    recorded = {path.name for path in tucker.iterdir() if path.is_file()}
    assert set(report.files) == recorded - {EVALUATION}
    assert report.bytes == sum((tucker / name).stat().st_size for name in report.files)
    assert report.url is None
    assert report.notes == ()
    card = ModelCard(report.card)
    facts = card.data.to_dict()  # type: ignore[no-untyped-call]
    assert facts["base_model"] == "me/tiny"
    assert facts["base_model_relation"] == "quantized"
    assert facts["license"] == "mit"
    kept = json.loads((tucker / EVALUATION).read_text(encoding="utf-8"))
    ratio = kept["divergence"]["perplexity_ratio"]["value"]
    assert f"× {ratio:.4f}" in report.card
    assert "python.txt: " in report.card
    assert str(tucker.parent) not in report.card  # no folders of this machine
    out = succeed("push", tucker, "me/small", "--dry-run")
    assert f"would upload {'model.safetensors.index.json'}" in out


def test_page_shows_what_was_measured(tucker: Path, tmp_path: Path) -> None:
    page = write_report(ReportRequest(folder=tucker, html=tmp_path / "page.html"))
    kept = json.loads((tucker / EVALUATION).read_text(encoding="utf-8"))
    assert f"{kept['divergence']['kl']['value']:.5f}" in page.read_text(encoding="utf-8")


def test_comparison_of_another_result_is_not_shown(
    model: Path, tucker: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    decompose(DecomposeRequest(model=model, output=other, keep=0.4))
    (other / EVALUATION).write_bytes((tucker / EVALUATION).read_bytes())
    report = push(PushRequest(folder=other, repository="me/small", dry_run=True))
    assert "## Measured" not in report.card
    assert len(report.notes) == 2  # base_model, and nothing measured


def test_reconstruction_can_be_published_and_damage_cannot(tucker: Path, tmp_path: Path) -> None:
    reconstruct(ReconstructRequest(folder=tucker, output=tmp_path / "dense"))
    report = push(
        PushRequest(
            folder=tmp_path / "dense", repository="me/dense", base_model="me/tiny", dry_run=True
        )
    )
    assert "license: mit" in report.card
    assert "base_model: me/tiny" in report.card
    weights = next((tmp_path / "dense").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=weights.name):
        push(PushRequest(folder=tmp_path / "dense", repository="me/dense", dry_run=True))


def test_upload_without_network_is_told(tucker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    done = run_here("push", tucker, "me/small")
    assert done.returncode == 2
    assert "cannot upload to me/small" in done.stderr


def test_full_disk_is_not_told_as_a_fault_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "cache")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", full)
    with pytest.raises(OSError, match="No space left"):
        download_model("me/tiny")

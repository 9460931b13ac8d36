"""The page of `report`: what it says is what the manifest and the files say."""

from __future__ import annotations

import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running import ROOT, run_here, succeed
from tests.tiny_models import add_tokenizer, make_tiny_model, write_text
from tuckerize.calibration import tokens as tokens_module
from tuckerize.calibration.layer_profile import LayerProfile
from tuckerize.calibration.profile_pass import ProfileCache

pytest.importorskip("matplotlib")

MODEL = ROOT / "examples" / "tiny-moe"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "out"
    succeed("decompose", "--model", MODEL, "--keep", "0.5", "--max-sweeps", "0", "--output", folder)
    succeed("shard", folder, "--tp", "2")
    return folder


def test_page_has_the_sizes_of_the_files_and_loads_nothing(out: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    succeed("report", out, "--html", file)
    text = file.read_text(encoding="utf-8")
    shards = list((out / "tp2").glob("*rank-00000*.safetensors"))
    assert f"{sum(p.stat().st_size for p in shards):,}" in text
    assert "not verified" in text
    assert "keep: 0.5" in text
    charts = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(charts) == 2
    for svg in charts:
        ET.fromstring(svg)
    assert not re.search(r'(?:src|href)="https?:', re.sub(r'xmlns(:\w+)?="[^"]*"', "", text))
    assert "#0103" not in text


def test_page_against_itself_shows_both_and_no_other_file_is_replaced(
    out: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(out, tmp_path / "other"))
    file = tmp_path / "page.html"
    succeed("report", out, "--against", other, "--html", file)
    succeed("report", out, "--against", other, "--html", file)  # our own is replaced
    assert file.read_text(encoding="utf-8").count("<h2>Reproduce of ") == 2
    file.write_text("a diary", encoding="utf-8")
    assert "name a file: --html" in run_here("report", out, "--html", tmp_path).stderr
    refused = run_here("report", out, "--html", file)
    assert refused.returncode == 2
    assert "no report of tuckerize" in refused.stderr
    assert file.read_text(encoding="utf-8") == "a diary"


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("calibrated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(tokens_module, "HELD_OUT_BLOCK", 64)  # some are left for validation
        model = add_tokenizer(make_tiny_model(folder / "model"))
        text = write_text(folder / "text.txt", 4096)
        options = ("--calibration", text, "--calibration-tokens", "2048", "--refine", "0")
        out = folder / "out"
        succeed("decompose", "--model", model, "--bits", "9", *options, "--output", out)
        yield out


def test_page_draws_the_curve_with_the_checkpoint_in_it_and_spectra(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "page.html"
    read: list[int] = []
    load = ProfileCache.load

    def counted(cache: ProfileCache, layer: int) -> LayerProfile | None:
        read.append(layer)
        return load(cache, layer)

    monkeypatch.setattr(ProfileCache, "load", counted)
    succeed("report", calibrated, "--html", file)
    assert read
    assert len(read) == len(set(read)), "every layer's profile is read once"
    text = file.read_text(encoding="utf-8")
    for words in ("this checkpoint", "bits per routed weight", "kept neurons of an expert"):
        assert words in text
    assert text.count("<svg") == 3 + 4
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    succeed("report", calibrated, "--html", file)
    text = file.read_text(encoding="utf-8")
    assert text.count("<svg") == 3
    assert "Not shown: this machine&#x27;s cache has no profile of it." in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_page_is_drawn_by_a_browser(out: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    succeed("report", out, "--html", file)
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    done = subprocess.run(
        [*command, f"--user-data-dir={tmp_path}/profile", file.as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.count("</svg>") == 2

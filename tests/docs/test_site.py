"""The documentation as a site."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

mkdocs_config = pytest.importorskip("mkdocs.config")


def test_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mkdocs.commands.build import build

    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    config = mkdocs_config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path))
    with caplog.at_level(logging.WARNING, logger="mkdocs"):
        build(config)
    assert [record.getMessage() for record in caplog.records] == []

    sources = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) >= len(sources)
    loaded = re.compile(r'(?:<script[^>]*src|<link[^>]*rel="stylesheet"[^>]*href)="?(https?:[^" >]+)')
    assert [found for page in pages for found in loaded.findall(page.read_text("utf-8"))] == []

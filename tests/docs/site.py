"""Hooks of MkDocs: pages outside of docs/ join the site, and links to other files become text.

In the repository a page links to `../../benchmarks/README.md`; on the site the folders of docs/ and
of the repository lie side by side, so that such a link has one `../` less.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tests.docs.pages import ROOT

_OUTSIDE = ("benchmarks/**/*.md", "benchmarks/results/*.png", "examples/tiny-moe/README.md")
_LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<target>(?!https?:|mailto:|#)[^)\s#]+)(?P<anchor>#[^)\s]+)?\)")  # fmt: skip


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures outside of docs/."""
    for pattern in _OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links of the repository into links of the site."""
    name = page.file.src_uri
    inside = Path(page.file.abs_src_path or "").is_relative_to(config.docs_dir)
    folder = posixpath.dirname(f"docs/{name}" if inside else name)

    def turned(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link["target"]))
        target = target.removeprefix("docs/")
        if files.get_file_from_path(target) is None:
            return link["text"].strip("![]")
        relative = posixpath.relpath(target, posixpath.dirname(name) or ".")
        return f"{link['text']}({relative}{link['anchor'] or ''})"

    return _LINK.sub(turned, markdown)

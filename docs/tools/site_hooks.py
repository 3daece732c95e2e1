"""Additions to MkDocs for the site.

The site also contains files from outside of ``docs``, notebooks become pages, formulas become MathML, and a page that
would load something from another server ends the build.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

import nbformat
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
OUTSIDE = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Path in the site by path in the repository."""
RESULTS = "benchmarks/results"
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
_FORMULA = re.compile(r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', re.DOTALL)
_FROM_OUTSIDE = re.compile(
    r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^>]*>|@import url\(http"
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the changelog, the rules for contributors and the results, and turn notebooks into pages."""
    for path, uri in OUTSIDE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    for path in sorted((ROOT / RESULTS).glob("*.md")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(notebook)
        _add_notebook(Path(str(notebook.abs_src_path)), notebook.src_uri, files, config)
    return files


def _add_notebook(path: Path, uri: str, files: Files, config: MkDocsConfig) -> None:
    folder = uri.removesuffix(".ipynb")
    resources = {"output_files_dir": path.stem}
    text, resources = MarkdownExporter().from_notebook_node(nbformat.read(path, as_version=4), resources)
    for name, content in resources["outputs"].items():
        files.append(File.generated(config, f"{os.path.dirname(uri)}/{name}", content=content))
    files.append(File.generated(config, f"{folder}.md", content=text))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to files of the repository at their pages, and remove links to files that the site lacks."""
    source = Path(str(page.file.abs_src_path)) if page.file.abs_src_path else DOCS / page.file.src_uri

    def replace(match: re.Match[str]) -> str:
        target = match["target"]
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = Path(os.path.normpath(source.parent / unquote(target)))
        if not path.exists() or not path.is_relative_to(ROOT):
            return match[0]  # MkDocs reports it
        uri = _site_uri(path.relative_to(ROOT).as_posix())
        if uri is None or files.get_file_from_path(uri) is None:
            return match["text"]
        relative = os.path.relpath(uri, os.path.dirname(page.file.src_uri) or ".")
        return f"[{match['text']}]({relative}{match['anchor'] or ''})"

    return _LINK.sub(replace, markdown)


def _site_uri(path: str) -> str | None:
    """Return the path in the site of a file of the repository, or None."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    if path == RESULTS:
        return "results.md"
    if path.startswith(f"{RESULTS}/"):
        return f"results/{os.path.basename(path)}"
    if path.startswith("docs/"):
        return re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))
    return None


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace formulas in LaTeX by MathML, which browsers show without a script."""

    def replace(match: re.Match[str]) -> str:
        text = match[2].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
        # Few fonts have the sign that latex2mathml writes for a set difference.
        return convert(text, display="block" if match[1] == "div" else "inline").replace("&#x029F5;", "&#x02216;")

    return _FORMULA.sub(replace, html)


def on_post_build(config: MkDocsConfig) -> None:
    """Check that no page loads anything from another server.

    Raises:
        PluginError: If one does.
    """
    found = [
        f"{path.relative_to(config.site_dir)}: {match[0][:120]}"
        for path in sorted(Path(config.site_dir).rglob("*"))
        if path.suffix in {".html", ".css"}
        for match in _FROM_OUTSIDE.finditer(path.read_text(encoding="utf-8"))
    ]
    if found:
        raise PluginError("pages load files from another server:\n" + "\n".join(found))

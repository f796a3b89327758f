"""Hooks of mkdocs: pages generated from the code and the results, their links, and a check.

No copy of a result is kept in ``docs``: the pages of the results, of the reference and of the
notebooks exist only while the site is built. Build the site by ``make docs``.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs.hooks import links, reference, results, tables
from docs.hooks.claims import INDEX, ROOT

log = logging.getLogger("mkdocs.hooks.site")
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.DOTALL)
_sources: dict[str, str] = {}  # page -> the file of the repository that its links are relative to


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the generated pages to the navigation."""
    for entry in config.nav or []:
        for title, inner in entry.items():
            if title == "Results":
                inner.append(
                    {"Figures and tables": [f"results/{name}.md" for name in results.names()]}
                )
                inner.append({"Notebooks": [links.page_of(path) for path in _notebooks()]})
            elif title == "Reference":
                inner += [{room: f"reference/{room}.md"} for room in reference.rooms()]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the generated pages and the files that they show."""
    _sources.clear()

    def add(page: str, source: str, text: str) -> None:
        _sources[page] = source
        files.append(File.generated(config, page, content=text))

    def serve(path: Path) -> None:
        target = links.page_of(path.relative_to(ROOT).as_posix())
        assert target is not None, path
        files.append(File.generated(config, target, abs_src_path=str(path)))

    for path, page in links.PAGES.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        add(page, path, results.index() if ROOT / path == INDEX else text)
    for name in results.names():
        add(f"results/{name}.md", f"paper_artifacts/{name}.md", results.page(name))
    for room in reference.rooms():
        add(f"reference/{room}.md", f"docs/reference/{room}.md", reference.page(room))
    add("reference/index.md", "docs/reference/index.md", reference.index())
    add("reference/commands.md", "docs/reference/commands.md", reference.command_page())
    for path in _notebooks():
        text, pictures = _notebook(ROOT / path)
        page = links.page_of(path)
        assert page is not None, path
        add(page, f"docs/{page}", links.rewritten(text, path, page))
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    served = [ROOT / name for name in links.FILES]
    served += [path for name in ("examples", "benchmarks") for path in (ROOT / name).glob("*.*")]
    for path in [*results.files(), *served]:
        serve(path)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links, which are those of the repository's own files, and mark long tables."""
    name = page.file.src_uri
    try:
        return tables.stacked(links.rewritten(markdown, _sources.get(name, f"docs/{name}"), name))
    except ValueError as error:
        log.warning("%s", error)  # an error in `make docs`, which is strict
        return markdown


def on_post_build(*, config: MkDocsConfig) -> None:
    """Check every link and anchor of the built pages."""
    for fault in links.broken(Path(config.site_dir).resolve()):
        log.warning("%s", fault)


def _notebooks() -> list[str]:
    return [f"notebooks/{path.name}" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]


def _notebook(path: Path) -> tuple[str, dict[str, Any]]:
    """Markdown of an executed notebook, and its pictures by name."""
    import nbformat
    from nbconvert import MarkdownExporter

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _FORMULA.sub(_mathml, cell.source)
    text, resources = MarkdownExporter().from_notebook_node(
        notebook, resources={"output_files_dir": ".", "unique_key": path.stem}
    )
    pictures = {Path(name).name: content for name, content in resources["outputs"].items()}
    return text, pictures


def _mathml(formula: re.Match[str]) -> str:
    """MathML of a formula, which browsers draw without a script."""
    from latex2mathml.converter import convert

    block = formula[1] is not None
    text: str = convert(formula[1] or formula[2], display="block" if block else "inline")
    return f'<span class="formula">{text}</span>' if block else text

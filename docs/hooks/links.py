"""Links of the site: from paths of the repository to pages, and a check of the built pages."""

from __future__ import annotations

import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# the pages that are generated from a file of the repository outside of docs/
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "SECURITY.md": "project/security.md",
    "paper_artifacts/README.md": "results/index.md",
}
# the files that are served as they are, by folder of the repository
FOLDERS = {
    "figures": "results/figures",
    "paper_artifacts/configs": "results/configs",
    "paper_artifacts": "results/files",
    "examples": "files/examples",
    "benchmarks": "files/benchmarks",
}
FILES = {"LICENSE": "files/LICENSE.txt", "CITATION.cff": "files/CITATION.cff.txt"}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")


def page_of(path: str) -> str | None:
    """Path in the site of a file of the repository; None if the site does not hold the file."""
    folder, name = posixpath.split(path)
    stem, ending = posixpath.splitext(name)
    if path in PAGES:
        return PAGES[path]
    if path in FILES:
        return FILES[path]
    if folder == "paper_artifacts" and ending == ".md":
        return f"results/{name}"
    if folder == "notebooks":  # and its pictures
        return f"notebooks/{stem}.md" if ending == ".ipynb" else path
    if folder in FOLDERS:
        # a browser shows text, and would run or save a script
        return f"{FOLDERS[folder]}/{name}{'.txt' if ending == '.py' else ''}"
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def rewritten(markdown: str, source: str, page: str) -> str:
    """Replace the relative links of the repository's file ``source`` by links from ``page``.

    Raises:
        ValueError: a link leads to a file that the site does not hold.
    """

    def replace(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        target = page_of(path)
        if target is None:
            raise ValueError(f"{source} links to {path}, which is not a part of the site")
        return posixpath.relpath(target, posixpath.dirname(page) or ".") + (match[2] or "")

    return LINK.sub(replace, markdown)


class _Page(HTMLParser):
    """The anchors of a page, and what the page refers to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag in ("a", "link") and "href" in values:
            (self.links if tag == "a" else self.loaded).add(values["href"])
        if tag in ("img", "script", "iframe", "source") and "src" in values:
            self.loaded.add(values["src"])


def broken(site: Path) -> list[str]:
    """Describe every link of the built site in folder ``site`` that leads nowhere.

    A link within the site must lead to a file, and its anchor must be in that file. An image, a
    script or a style sheet must come from the site itself, so that the site can be read offline.
    """
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    faults = []
    for path, page in pages.items():
        name = path.relative_to(site).as_posix()
        for link in page.links | page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loaded and parts.scheme != "data":
                    faults.append(f"{name}: {link} is loaded from another host")
                continue
            if name == "404.html":
                continue  # its links begin at the root of a server
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                faults.append(f"{name}: {link} leads to no file")
            elif parts.fragment and target in pages:
                if unquote(parts.fragment) not in pages[target].anchors:
                    faults.append(f"{name}: {link} leads to no anchor")
    return sorted(faults)

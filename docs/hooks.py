"""What mkdocs does not do by itself: pages and files of this repository outside docs/ become part of the site.

Links in a page are those that hold where the page lies in the repository (`../examples/serve.md`); on the site the
same file is a page, or, where it is no Markdown, a file beside the pages.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUTSIDE = ("SECURITY.md", "examples/*.md")
SECTION = "Workstations and clusters"  # of the menu: where an example is that has no place of its own in it
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put examples that the menu does not name into its SECTION, under their own titles."""
    menu = str(config.nav)
    for entry in config.nav or []:
        for path in sorted(ROOT.glob("examples/*.md")):
            uri = path.relative_to(ROOT).as_posix()
            if SECTION in entry and uri not in menu:
                entry[SECTION].append(uri)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of OUTSIDE, and whatever a page links to, and so on."""
    waiting = [file.src_uri for file in files.documentation_pages()]
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            waiting += _added(path.relative_to(ROOT).as_posix(), files, config)
    while waiting:
        uri = waiting.pop()
        text = (ROOT / _place(uri, files)).read_text(encoding="utf-8")
        for _, target, _ in LINK.findall(text):
            waiting += _added(_uri(uri, target, files), files, config)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with links that hold on the site."""
    own = page.file.src_uri

    def on_site(link: re.Match[str]) -> str:
        target = posixpath.relpath(_uri(own, link[2], files), posixpath.dirname(own) or ".")
        return f"{link[1]}{target}{link[3]}"

    return LINK.sub(on_site, markdown)


def _place(uri: str, files: Files) -> str:
    """Where a page of the site lies in the repository."""
    file = files.get_file_from_path(uri)
    assert file is not None
    return Path(file.abs_src_path or "").relative_to(ROOT).as_posix()


def _uri(page: str, target: str, files: Files) -> str:
    """Where on the site that lies to which `page` links as `target`, from its place in the repository."""
    place = posixpath.normpath(posixpath.join(posixpath.dirname(_place(page, files)), target))
    return place.removeprefix("docs/")


def _added(uri: str, files: Files, config: MkDocsConfig) -> list[str]:
    """Add a file of the repository to the site; its name, if it is a page that was not there."""
    path = ROOT / uri
    if files.get_file_from_path(uri) is not None or not path.is_file():
        return []
    files.append(File.generated(config, uri, abs_src_path=str(path)))
    return [uri] if path.suffix == ".md" else []

"""What mkdocs.yml adds to mkdocs: linked source files, and docstrings in the form that griffe reads."""

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_LINK = re.compile(r"\]\(((?:\.\./)+[\w./-]+)\)")
_ROLE = re.compile(r":(?:class|func|data|attr|meth|mod):`~?([^`]+)`")
_SHARED = re.compile(r"^( +)(\w+(?:, \w+)+):( .*(?:\n\1 +\S.*)*)", re.MULTILINE)


def _outside(page: str, link: str) -> str | None:
    """The path in the checkout that a page's link leads to; None inside docs/."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    return path.removeprefix("../") if path.startswith("../") else None


def _copied(path: str) -> str:
    """Where a file of the checkout is in the site; as .txt, so that a browser shows it."""
    return f"source/{path}.txt"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Copy every file that a page links to beyond docs/ into the site, which is complete by itself then."""
    root = Path(config.docs_dir).parent
    for page in list(files.documentation_pages()):
        for link in _LINK.findall(page.content_string):
            path = _outside(page.src_uri, link)
            if path and (root / path).is_file() and files.get_file_from_path(_copied(path)) is None:
                files.append(File.generated(config, _copied(path), abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point these links to the copies."""
    up = "../" * page.file.src_uri.count("/")

    def pointed(link: re.Match[str]) -> str:
        path = _outside(page.file.src_uri, link[1])
        return f"]({up}{_copied(path)})" if path else link[0]

    return _LINK.sub(pointed, markdown)


class Docstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed.

    Sphinx's roles become code, since they may name what no page describes, and a line about several arguments
    (``k, v: ...``) becomes one for each.
    """

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            text = _ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = _SHARED.sub(
                lambda line: "\n".join(f"{line[1]}{name}:{line[3]}" for name in line[2].split(", ")), text
            )

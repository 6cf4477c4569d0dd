"""Markdown pages: their links, anchors and code, and what is wrong with them.

Every check yields sentences that start with the line. Code is checked as far as it goes without running it:
commands parse with the flags that they define, imports exist, JSON parses.
"""

import ast
import collections
import dataclasses
import functools
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.helpers.shell import ROOT, Unknown, commands, complaint_of, is_ours, syntax_error

UNCHECKED = {"text", "mermaid", "bibtex"}
"""Languages of fenced blocks that need no check."""

PACKAGES = ("gaze_jax", "pallas_kernels", "benchmarks")

_HTML_LINK = re.compile(r"""<(?:a|img)\b[^>]*?\b(?:href|src)=["']([^"']+)["']""")
_HTML_ANCHOR = re.compile(r"""<\w+\b[^>]*?\b(?:id|name)=["']([^"']+)["']""")


@dataclasses.dataclass(frozen=True)
class Code:
    """Code of a page: a fenced block, or a span within a sentence, which has no language."""

    line: int
    language: str | None
    text: str


@dataclasses.dataclass(frozen=True)
class Page:
    """A Markdown page: its address in the checkout and its text."""

    path: Path
    text: str

    @classmethod
    def read(cls, path: Path) -> "Page":
        return cls(path, path.read_text(encoding="utf-8"))

    @functools.cached_property
    def _tokens(self) -> list[Token]:
        return MarkdownIt("commonmark").enable("table").parse(self.text)

    def _spans(self) -> Iterator[tuple[int, Token]]:
        """Every token within a paragraph, heading or cell, with the line where that starts."""
        for token in self._tokens:
            for child in token.children or ():
                yield token.map[0] + 1, child

    def links(self) -> Iterator[tuple[int, str]]:
        """Line and target of every link and image."""
        for line, span in self._spans():
            if span.type in ("link_open", "image"):
                yield line, str(span.attrGet("href") or span.attrGet("src"))
            elif span.type == "html_inline":
                yield from ((line, target) for target in _HTML_LINK.findall(span.content))
        for token in self._tokens:
            if token.type == "html_block":
                yield from ((token.map[0] + 1, target) for target in _HTML_LINK.findall(token.content))

    def anchors(self) -> set[str]:
        """What #... may name: headings as GitHub turns them into anchors, and ids in HTML."""
        found, taken = set(_HTML_ANCHOR.findall(self.text)), collections.Counter[str]()
        for heading, inline in zip(self._tokens, self._tokens[1:]):
            if heading.type == "heading_open":
                words = "".join(t.content for t in inline.children if t.type in ("text", "code_inline"))
                anchor = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
                taken[anchor] += 1
                found.add(anchor if taken[anchor] == 1 else f"{anchor}-{taken[anchor] - 1}")
        return found

    def blocks(self) -> Iterator[Code]:
        """Fenced and indented blocks."""
        for token in self._tokens:
            if token.type in ("fence", "code_block"):
                yield Code(token.map[0] + 1, token.info.split(" ")[0], token.content)

    def inline_code(self) -> Iterator[Code]:
        """Code within sentences."""
        for line, span in self._spans():
            if span.type == "code_inline":
                yield Code(line, None, span.content)


def link_complaints(page: Page) -> Iterator[str]:
    """Relative links to nothing, and anchors that the linked page lacks."""
    for line, target in page.links():
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.path.parent / name).resolve() if name else page.path
        if name and not path.exists():
            yield f"line {line}: {target} does not exist"
        elif not path.is_relative_to(ROOT):
            yield f"line {line}: {target} is outside the checkout"
        elif anchor and path.suffix == ".md":
            known = page.anchors() if path == page.path else Page.read(path).anchors()
            if anchor not in known:
                yield f"line {line}: {name or 'this page'} has no heading for #{anchor}"


def code_complaints(page: Page) -> Iterator[str]:
    """Fenced blocks that cannot work."""
    checks = {"sh": shell_complaints, "python": python_complaints, "json": json_complaints}
    for block in page.blocks():
        if block.language in checks:
            yield from checks[block.language](block)
        elif block.language not in UNCHECKED:
            known = ", ".join([*checks, *sorted(UNCHECKED)])
            yield f"line {block.line}: a block of language {block.language!r}; it must be one of {known}"


def inline_complaints(page: Page, flags: set[str]) -> Iterator[str]:
    """Commands and flags within sentences; a flag must be one of ``flags``."""
    for code in page.inline_code():
        flag = re.match(r"--(\w[\w-]*)", code.text)
        if flag and flag[1] not in flags:
            yield f"line {code.line}: no command has the flag --{flag[1]}"
        elif is_ours(code.text):
            for command in commands(code.text):
                if wrong := complaint_of(command.words, complete=False):
                    yield f"line {code.line}: {wrong}"


def shell_complaints(block: Code) -> Iterator[str]:
    """Invalid syntax, unknown commands, and flags that a command does not have."""
    if wrong := syntax_error(block.text):
        yield f"line {block.line}: {wrong}"
        return
    for command in commands(block.text):
        try:
            wrong = complaint_of(command.words, complete=True)
        except Unknown as error:
            wrong = str(error)
        if wrong:
            yield f"line {block.line + command.line}: {wrong}"


def json_complaints(block: Code) -> Iterator[str]:
    """A block that is not one JSON value."""
    try:
        json.loads(block.text)
    except json.JSONDecodeError as error:
        yield f"line {block.line + error.lineno}: not JSON ({error.msg})"


def python_complaints(block: Code) -> Iterator[str]:
    """Invalid syntax; names of this project that do not exist; keywords that a function does not take."""
    try:
        tree = ast.parse(block.text)
    except SyntaxError as error:
        yield f"line {block.line + (error.lineno or 0)}: {error.msg}"
        return
    known: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (f"line {block.line + node.lineno}: {wrong}" for wrong in _import(node, known))
    for node in ast.walk(tree):
        wrong = None
        if isinstance(node, ast.Attribute):
            wrong = _missing(node, known)
        elif isinstance(node, ast.Call) and not _missing(node.func, known):
            wrong = _refused(_value(node.func, known), [k.arg for k in node.keywords if k.arg])
        if wrong:
            yield f"line {block.line + node.lineno}: {ast.unparse(node)[:60]}: {wrong}"


def _missing(node: ast.expr, known: dict[str, object]) -> str | None:
    """What a dotted name of this project lacks."""
    try:
        _value(node, known)
    except AttributeError as error:
        return str(error)
    return None


def _refused(called: object, keywords: list[str]) -> str | None:
    """Why a function or class of this project does not take these keywords."""
    if not callable(called):
        return None
    try:
        inspect.signature(called).bind_partial(**dict.fromkeys(keywords))
    except TypeError as error:
        return str(error)
    return None


def _import(node: ast.Import | ast.ImportFrom, known: dict[str, object]) -> Iterator[str]:
    """Adds what an import of this project binds to ``known``; yields what it does not find."""
    for alias in node.names:
        module = alias.name if isinstance(node, ast.Import) else str(node.module)
        root = module.split(".")[0]
        if root not in PACKAGES:
            continue
        try:
            found: object = importlib.import_module(module)
            if isinstance(node, ast.ImportFrom):
                found = _member(found, alias.name)
                known[alias.asname or alias.name] = found
            else:
                known[alias.asname or root] = found if alias.asname else importlib.import_module(root)
        except (ImportError, AttributeError) as error:
            yield str(error)


def _member(value: object, name: str) -> object:
    """An attribute, or a submodule that nothing has imported yet."""
    if isinstance(value, ModuleType) and not hasattr(value, name):
        try:
            return importlib.import_module(f"{value.__name__}.{name}")
        except ImportError:
            raise AttributeError(f"{value.__name__} has no {name}") from None
    return getattr(value, name)


def _value(node: ast.expr, known: dict[str, object]) -> object:
    """What an expression names: of modules and classes of this project; None for anything else.

    Raises:
      AttributeError: a module or class lacks the name.
    """
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _value(node.value, known)
        if isinstance(owner, ModuleType | type):
            return _member(owner, node.attr)
    return None

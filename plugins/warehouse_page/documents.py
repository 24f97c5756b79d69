"""docs/*.md as HTML, for the links in failure messages: an Airflow without internet has its manual too."""

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt

DOCS = Path(__file__).resolve().parents[2] / "docs"


def names() -> list[str]:
    """The documents that are there, in the order of their names."""
    return sorted(path.name for path in DOCS.glob("*.md"))


def render(name: str) -> tuple[str, str]:
    """Title and HTML of a document. HTML in it is shown as text.

    :raises FileNotFoundError: docs/ has no such file; whatever else `name` says, such as a way out of the folder.
    """
    if name not in names():
        raise FileNotFoundError(name)
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = markdown.parse((DOCS / name).read_text())
    title, seen = name, Counter[str]()
    for heading, content in pairwise(tokens):
        if heading.type == "heading_open":
            anchor = _anchor(content.content)
            heading.attrSet("id", f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
            seen[anchor] += 1
            title = content.content if heading.tag == "h1" else title
    for token in (child for parent in tokens for child in parent.children or ()):
        if token.type == "link_open" and "://" in str(token.attrGet("href")):
            token.attrSet("target", "_top")
    return title, markdown.renderer.render(tokens, markdown.options, {})


def picture(name: str) -> Path:
    """A picture of a document.

    :raises FileNotFoundError: as above.
    """
    for path in (DOCS / "img").glob("*"):
        if path.name == name:
            return path
    raise FileNotFoundError(name)


def _anchor(heading: str) -> str:
    """As GitHub makes it, which the links between the documents count on."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")

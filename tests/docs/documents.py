"""What stands in the README and docs/*.md: blocks, commands, queries, links, headings."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.warehouse import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# In running text these words begin a command, if another word follows.
PROGRAMS = r"(?:make|docker|kubectl|helm|alembic|psql|python|pip|airflow|chmod|iconv|git|\.venv/bin/\S+|local/\S+\.sh)"
SQL = re.compile(r"(?:--.*\n\s*)*(?:SELECT|WITH|CREATE|ALTER|GRANT)\b")
# Indented text that is to be looked at: the flow, and lines of .env.
DRAWINGS = ("generate_batch", "generator ──>", "COMPOSE_FILE=")


@dataclass(frozen=True)
class Block:
    """:param kind: bash, line (a command by itself), sql, python, text or diff."""

    document: Path
    number: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.document.name}:{self.number} {' '.join(self.text.split())[:60]}"


def blocks() -> Iterator[Block]:
    for document in DOCUMENTS:
        text = document.read_text()
        for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            yield Block(document, line_of(text, found), found[1] or "text", found[2])
        text = without_fences(text)
        for found in re.finditer(r"(?:\A|\n\n)((?:    .*\n|\n(?=    ))+)", text):
            yield from indented(document, line_of(text, found) + 2, re.sub("^    ", "", found[1], flags=re.MULTILINE))
        text = re.sub(r"^    .*", "", text, flags=re.MULTILINE)
        for found in re.finditer(rf"`({PROGRAMS}\s[^`]+)`", text):
            yield Block(document, line_of(text, found), "line", " ".join(found[1].split()))
        for found in re.finditer(r"`(SELECT\s[^`]+)`", text):
            yield Block(document, line_of(text, found), "sql", found[1])


def indented(document: Path, number: int, text: str) -> Iterator[Block]:
    if text.startswith("$ "):  # a command and what it prints
        yield Block(document, number, "line", text[2:].splitlines()[0])
    elif SQL.match(text):
        yield Block(document, number, "sql", text)
    elif not text.startswith(DRAWINGS):
        for place, line in enumerate(filter(None, text.splitlines())):
            yield Block(document, number + place, "line", re.sub(r" +# .*", "", line))


def without_fences(text: str) -> str:
    """With as many lines, so that a place in it is the place in the document."""
    return re.sub(r"^```.*?^```$", blank, text, flags=re.MULTILINE | re.DOTALL)


def blank(found: re.Match[str]) -> str:
    return "\n" * found[0].count("\n")


def line_of(text: str, found: re.Match[str]) -> int:
    return text.count("\n", 0, found.start()) + 1


def links() -> Iterator[tuple[Path, str]]:
    for document in DOCUMENTS:
        for target in re.findall(r"(?:\]\(|(?:src|srcset|href)=\")([^)\s\"]+)", without_fences(document.read_text())):
            yield document, target


def anchors(document: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)", without_fences(document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}

"""The documents of this repository, read as Markdown."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block; ``line`` is where its text begins."""

    path: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.path.name}:{self.line}"


@functools.cache
def blocks() -> list[Block]:
    found = []
    for path in DOCUMENTS:
        text = path.read_text("utf-8")
        for match in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE):
            indent, language, body = match.groups()
            lines = [line.removeprefix(indent) for line in body.splitlines(keepends=True)]
            line_number = text.count("\n", 0, match.start()) + 2
            found.append(Block(path, line_number, language, "".join(lines)))
    return found


def in_language(*languages: str) -> list[Block]:
    return [block for block in blocks() if block.language in languages]


def prose(path: Path) -> str:
    """The text without its fenced blocks."""
    return re.sub(
        r"^( *)```.*?^\1```$", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE
    )


def code_spans(path: Path) -> set[str]:
    return {" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(path))}


def slugs(path: Path) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {
        slug if not n else f"{slug}-{n}" for slug, last in found.items() for n in range(last + 1)
    }


def tables(path: Path) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Header and rows of each table."""
    for table in re.findall(r"(?:^\|.*\|\n)+", prose(path) + "\n", re.MULTILINE):
        rows = [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]
            for line in table.splitlines()
        ]
        yield rows[0], rows[2:]


def columns_of(name: str) -> list[tuple[Path, dict[str, str]]]:
    """The rows, as header to cell, of all tables whose first column has this header."""
    return [
        (path, dict(zip(header, row, strict=True)))
        for path in DOCUMENTS
        for header, rows in tables(path)
        if header[0] == name
        for row in rows
    ]


def code(cell: str) -> str:
    """The code that a cell consists of, or nothing."""
    match = re.fullmatch(r"`([^`]+)`", cell)
    return match[1] if match else ""

"""Fenced blocks of README and docs, and the commands in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> Iterator[Block]:
    for page in PAGES:
        name, lines = page.relative_to(REPOSITORY).as_posix(), page.read_text().splitlines()
        start: int | None = None
        for number, line in enumerate(lines):
            if not line.strip().startswith("```"):
                continue
            if start is None:
                start = number
                continue
            indent = len(lines[start]) - len(lines[start].lstrip())
            body = "\n".join(content[indent:] for content in lines[start + 1 : number])
            yield Block(name, start + 1, lines[start].strip("` "), body)
            start = None
        assert start is None, f"{name}: a fence is not closed"


BLOCKS = list(blocks())
SHELL = [block for block in BLOCKS if block.language == "" and re.match(r"[$\w./]", block.text)]


def commands_of(block: Block) -> list[str]:
    """What a shell runs one after another: a line each, with continued ones joined and comments left out; a block with a loop or
    a text for a program (<<) as a whole."""
    text = re.sub(r"\\\n\s*", "", block.text)
    if re.search(r"<<|^(for|if) .*\n", text, flags=re.M):
        return [text]
    return [line for each in text.splitlines() if (line := re.split(r"\s+#", each)[0].strip())]

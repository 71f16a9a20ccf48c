"""The documentation as tests read it: pages in, their blocks of code, commands, spans and links out."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
OUTSIDE = ("README.md", "benchmarks/README.md", "tests/README.md")
_FENCE = re.compile(r"^( *)```(\w*)$")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its page, the line that it begins in, its language, and its text without indentation."""

    page: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a block of shell, with the environment that it sets before it left out."""

    place: str
    words: tuple[str, ...]


def pages() -> list[str]:
    """Every page, by its path in the repository."""
    return [*OUTSIDE, *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[Block]:
    """The fenced blocks of a language."""
    return [block for block in _all_blocks(page) if block.language == language]


def _all_blocks(page: str) -> list[Block]:
    found, opened, inside = [], None, []
    for number, line in enumerate(read(page).splitlines(), start=1):
        fence = _FENCE.match(line)
        if opened is None and fence:
            opened, inside = (number, fence[2], len(fence[1])), []
        elif opened is not None and fence and not fence[2]:
            found.append(Block(page, opened[0] + 1, opened[1], "\n".join(inside) + "\n"))
            opened = None
        elif opened is not None:
            inside.append(line[opened[2] :])
    assert opened is None, f"{page}: the block in line {opened} has no end"
    return found


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    out, inside = [], False
    for line in read(page).splitlines():
        if _FENCE.match(line):
            inside = not inside
        elif not inside:
            out.append(line)
    return "\n".join(out)


def spans(page: str) -> list[str]:
    """Code within a page's sentences, each with its line breaks as spaces."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def commands(page: str) -> list[Command]:
    """The commands of a page's blocks of shell, in order."""
    out = []
    for block in blocks(page, "sh"):
        for offset, line in enumerate(block.text.replace("\\\n", " ").splitlines()):
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                out.append(Command(f"{page}:{block.line + offset}", tuple(words)))
    return out


def links(page: str) -> list[str]:
    """Where the links and images of a page lead."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def anchors(page: str) -> set[str]:
    """What its headings are called in addresses."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}

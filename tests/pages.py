"""The pages of the documentation as data: their blocks of code, their links and their headings."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}

# What the paragraph before a block begins with, if the block needs more than a test has.
NEEDS = "Needs: "

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True, slots=True)
class Block:
    """A block of code.

    Attributes:
        page: its page, from the root of the repository.
        line: where it begins, from 1.
        language: what follows the fence.
        text: what is in it.
        marked: the reader is told what it needs.
    """

    page: str
    line: int
    language: str
    text: str
    marked: bool

    def commands(self) -> list[list[str]]:
        """The arguments of each command of a shell block."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, *languages: str) -> list[Block]:
    """The blocks of a page in some languages."""
    text = PAGES[page]
    return [
        Block(
            page,
            text.count("\n", 0, found.start()) + 1,
            found[1],
            found[2],
            text[: found.start()].rstrip().rpartition("\n\n")[2].startswith(NEEDS),
        )
        for found in _FENCE.finditer(text)
        if found[1] in languages
    ]


def prose(page: str) -> str:
    """A page without its blocks of code."""
    return _FENCE.sub("", PAGES[page])


def code(page: str) -> list[str]:
    """What stands between backticks in the prose of a page."""
    return _CODE.findall(prose(page))


def links(page: str) -> Iterator[str]:
    """Where the links and pictures of a page lead."""
    return (found[1] for found in re.finditer(r"\]\(([^)\s]+)\)", _CODE.sub("", prose(page))))


def anchors(page: str) -> set[str]:
    """The names of a page's headings, as forges make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }

"""The pages of the documentation as data: their code blocks, links and headings."""

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

# Beginning of the paragraph before a code block that needs something that a test does not have.
NEEDS = "Needs: "

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced code block of a page.

    Attributes:
        page: path of the page, relative to the root of the repository.
        line: line of the opening fence, from 1.
        language: the word after the opening fence.
        text: content of the block.
        marked: whether the paragraph before it begins with `NEEDS`.
    """

    page: str
    line: int
    language: str
    text: str
    marked: bool

    def commands(self) -> list[list[str]]:
        """Split a shell block into commands, each a list of the program and its arguments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, *languages: str) -> list[Block]:
    """Return the code blocks of a page in some languages."""
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
    """Return the text of a page without its code blocks."""
    return _FENCE.sub("", PAGES[page])


def code(page: str) -> list[str]:
    """Return all inline code in the prose of a page."""
    return _CODE.findall(prose(page))


def links(page: str) -> Iterator[str]:
    """Return the targets of the links and pictures of a page."""
    return (found[1] for found in re.finditer(r"\]\(([^)\s]+)\)", _CODE.sub("", prose(page))))


def anchors(page: str) -> set[str]:
    """Return the anchors of a page's headings, as sites such as GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }

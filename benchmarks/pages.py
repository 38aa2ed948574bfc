"""Sections of pages that commands write."""

from pathlib import Path


def marks(command: str) -> tuple[str, str]:
    """The lines before and after a section; the first says how to write the section again."""
    return (
        f"<!-- begin: written by `{command}`, not by hand -->\n",
        f"<!-- end: `{command}` -->\n",
    )


def rewritten(page: str, command: str, section: str) -> str:
    """A page with another section between the marks of a command.

    Args:
        page: Markdown.
        command: which one writes the section.
        section: Markdown that ends with the end of a line.

    Raises:
        ValueError: the page has not both of the marks, once and in their order.
    """
    begin, end = marks(command)
    head, rest = _split(page, begin)
    _, tail = _split(rest, end)
    return f"{head}{begin}{section}{end}{tail}"


def rewrite(path: Path, command: str, section: str) -> None:
    """Write another section into a page; see `rewritten`."""
    page = path.read_text(encoding="utf-8")
    path.write_text(rewritten(page, command, section), encoding="utf-8")


def _split(text: str, mark: str) -> tuple[str, str]:
    """What is before and behind a mark."""
    parts = text.split(mark)
    if len(parts) != 2:
        raise ValueError(f"{mark.strip()} is there {len(parts) - 1} times, not once")
    return parts[0], parts[1]

"""Sections of documentation pages that are written by commands."""

from pathlib import Path


def marks(command: str) -> tuple[str, str]:
    """Return the marker lines around a section; they name the command that writes it."""
    return (
        f"<!-- begin: written by `{command}`, not by hand -->\n",
        f"<!-- end: `{command}` -->\n",
    )


def rewritten(page: str, command: str, section: str) -> str:
    """Return a page with a new section between the markers of a command.

    Args:
        page: the page in Markdown.
        command: the command that writes the section.
        section: the new section in Markdown, with a newline at the end.

    Raises:
        ValueError: a marker does not occur exactly once, or the end marker comes first.
    """
    begin, end = marks(command)
    head, rest = _split(page, begin)
    _, tail = _split(rest, end)
    return f"{head}{begin}{section}{end}{tail}"


def rewrite(path: Path, command: str, section: str) -> None:
    """Replace a section in the page at a path; see `rewritten`."""
    page = path.read_text(encoding="utf-8")
    path.write_text(rewritten(page, command, section), encoding="utf-8")


def _split(text: str, mark: str) -> tuple[str, str]:
    """Return the text before and after a marker."""
    parts = text.split(mark)
    if len(parts) != 2:
        raise ValueError(f"the marker {mark.strip()} is there {len(parts) - 1} times, not once")
    return parts[0], parts[1]

"""Escape text from models and users for Markdown.

Names, prompts and generated texts are not trusted: a Markdown viewer would follow their links, load
their images and, where it lets HTML through, run their scripts.
"""

import re


def literal(text: str) -> str:
    """Escape text so that Markdown shows it literally, on one line."""
    escaped = re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", text)
    return " ".join(escaped.split())


def quote(text: str) -> str:
    """Format text as a block quotation that shows it literally."""
    return "\n".join(f"> {literal(line)}" for line in text.strip().splitlines())


def code(text: str) -> str:
    """Format text as inline code on one line.

    The fence has more backticks than any run of backticks in the text, so the text cannot end it.
    """
    line = " ".join(text.split())
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def code_block(lines: str) -> str:
    """Format lines as an indented code block, which no text in them can end."""
    return "\n".join(f"    {line}" for line in lines.splitlines())

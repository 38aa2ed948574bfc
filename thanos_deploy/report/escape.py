"""Text of models and users in Markdown, where it may not become markup.

Names, prompts and what a model wrote come from outside; a viewer of Markdown would follow their
links, load their pictures and, where it lets HTML through, run their scripts.
"""

import re


def literal(text: str) -> str:
    """Text that Markdown takes literally, on one line."""
    escaped = re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", text)
    return " ".join(escaped.split())


def quote(text: str) -> str:
    """Lines of text as a quotation, literally."""
    return "\n".join(f"> {literal(line)}" for line in text.strip().splitlines())


def code(text: str) -> str:
    """Text as code within a line: between more backticks than stand in it, on one line."""
    line = " ".join(text.split())
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def code_block(lines: str) -> str:
    """Lines as an indented block of code, which nothing in them can end."""
    return "\n".join(f"    {line}" for line in lines.splitlines())

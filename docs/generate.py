"""Write the generated pages: the reference of commands, that of the API, and the picture.

Usage: python -m docs.generate

Each is a function from what the code says to the text of a file. A test fails if a file that is
committed differs from that text.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from docs import api, commands, models, picture

ROOT = Path(__file__).parent

# File below docs/ -> what writes it.
GENERATED: Mapping[str, Callable[[], str]] = {
    "reference/commands.md": commands.page,
    "reference/api.md": api.page,
    "models.md": models.page,
    "images/patterns.svg": picture.draw,
}


def main() -> None:
    """Write all files."""
    for name, write in GENERATED.items():
        path = ROOT / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(write(), encoding="utf-8")


if __name__ == "__main__":
    main()

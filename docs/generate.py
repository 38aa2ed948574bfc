"""Write the generated pages: both references, the table of models, and the picture.

Usage: python -m docs.generate

The text of each file is generated from the code by one function. A test fails if a committed file
differs from that text.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from docs import api, commands, models, picture

ROOT = Path(__file__).parent

# Maps a file below docs/ to the function that returns its text.
GENERATED: Mapping[str, Callable[[], str]] = {
    "reference/commands.md": commands.page,
    "reference/api.md": api.page,
    "models.md": models.page,
    "images/patterns.svg": picture.draw,
}


def main() -> None:
    """Write all generated files."""
    for name, write in GENERATED.items():
        path = ROOT / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(write(), encoding="utf-8")


if __name__ == "__main__":
    main()

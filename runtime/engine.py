"""What every backend offers: two verbs, and a kv cache that it keeps to itself."""

import json
import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime import engines
from thanos_deploy.artifact import Bundle
from thanos_deploy.errors import InputError, UsageError

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


class Engine(Protocol):
    """A causal language model that is ready to run.

    Attributes:
        max_sequence: the most tokens of a sequence, prompt and answer together.
    """

    max_sequence: int

    def prefill(self, ids: Ids, mask: Ids | None = None) -> Logits:
        """Forget everything, read a batch of prompts, and return what follows them.

        Args:
            ids: int64[batch, tokens].
            mask: int64[batch, tokens], 0 for padding, which must be on the left; None if there
                is none.

        Returns:
            float32[batch, vocabulary], the logits after the last token.

        Raises:
            UsageError: no sequence, no token, an id outside the vocabulary, or more tokens than
                the engine takes.
        """

    def decode(self, ids: Ids) -> Logits:
        """Append one token to every sequence and return what follows it.

        Args:
            ids: int64[batch].

        Returns:
            float32[batch, vocabulary].

        Raises:
            UsageError: the sequences are as long as the engine takes.
        """


def backends() -> list[str]:
    """Names of the backends, sorted.

    Each is a module with `open_engine(bundle, provider=...)`, and `stage(bundle)`: the stage whose
    files it reads.
    """
    return sorted(module.name for module in pkgutil.iter_modules(engines.__path__))


def open_engine(
    bundle: Path, *, backend: str = "onnxruntime", provider: str = "cpu", verify: bool = True
) -> Engine:
    """Load the exported model of a bundle.

    Args:
        bundle: its folder.
        backend: one of `backends()`.
        provider: what the backend is to run on; it never falls back to another one.
        verify: compare the files with the hashes in the manifest before the backend reads them.

    Raises:
        InputError: the bundle has no exported model, or it cannot be loaded.
        IntegrityError: a file is missing, truncated or changed.
        PlatformError: the backend or the provider is not usable on this machine.
        UsageError: there is no such backend or provider.
    """
    if backend not in backends():
        raise UsageError(
            f"backend {backend!r} is not known", fix=f"give one of {', '.join(backends())}"
        )
    module = import_module(f"runtime.engines.{backend}")
    opened = Bundle.open(bundle)
    stage = module.stage(opened)
    if verify:
        opened.verify(stage)
    engine: Engine = module.open_engine(bundle, provider=provider)
    return engine


def stop_ids(model: Path) -> frozenset[int]:
    """Ids of the tokens that end a text, from the configuration in a model folder.

    Raises:
        InputError: the configuration is not readable.
    """
    for name in ("generation_config.json", "config.json"):
        path = model / name
        try:
            value = json.loads(path.read_bytes()).get("eos_token_id")
        except FileNotFoundError:
            continue
        except (ValueError, AttributeError) as error:
            raise InputError(
                f"{path}: not readable ({error})", fix="restore the file from the bundle's origin"
            ) from error
        if value is not None:
            return frozenset(value if isinstance(value, list) else [value])
    return frozenset()

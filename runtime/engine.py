"""What every backend offers: two verbs, and a kv cache that it keeps to itself."""

import json
import pkgutil
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime import engines
from thanos_deploy.bundle.manifest import Bundle
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
    """Names of the backends, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(engines.__path__))


def open_engine(
    bundle: Path,
    *,
    backend: str = "onnxruntime",
    provider: str = "cpu",
    threads: int | None = None,
    verify: bool = True,
) -> Engine:
    """Load the model of a bundle.

    Args:
        bundle: its folder.
        backend: one of `backends()`; where it has several ways to run, one of its `VARIANTS` after
            a colon, as in "torch:compiled".
        provider: what the backend is to run on; it never falls back to another one.
        threads: how many compute on a CPU; None for the backend's own choice.
        verify: compare the files with the hashes in the manifest before the backend reads them.

    Raises:
        InputError: the bundle lacks what the backend reads, or it cannot be loaded.
        IntegrityError: a file is missing, truncated or changed.
        PlatformError: the backend or the provider is not usable on this machine.
        UsageError: there is no such backend, variant or provider.
    """
    name, _, variant = backend.partition(":")
    if name not in backends():
        raise UsageError(
            f"backend {name!r} is not known", fix=f"give one of {', '.join(backends())}"
        )
    module = import_module(f"runtime.engines.{name}")
    variants = getattr(module, "VARIANTS", ())
    if variant and variant not in variants:
        raise UsageError(
            f"backend {name} has no variant {variant!r}",
            fix=f"give one of {', '.join([name, *(f'{name}:{known}' for known in variants)])}",
        )
    require_stage(bundle, module, verify=verify)
    engine: Engine = module.open_engine(
        bundle,
        provider=provider,
        threads=threads,
        **({"variant": variant} if variant else {}),
    )
    return engine


def require_stage(bundle: Path, backend: ModuleType, *, verify: bool) -> None:
    """Refuse a bundle without what a backend reads.

    Args:
        bundle: its folder.
        backend: its module, one of `runtime.engines`.
        verify: compare the files with the hashes in the manifest, too.

    Raises:
        InputError: no finished stage made it.
        IntegrityError: a file is missing, truncated or changed.
    """
    opened = Bundle.open(bundle)
    folder = backend.folder(opened)
    stages = opened.stages_of(folder)
    if not stages:
        raise InputError(
            f"{bundle}: no finished stage made {folder}/",
            fix=f"run `{backend.COMMAND.format(bundle=bundle)}` first",
        )
    if verify:
        opened.verify(*stages)


def require_readable(ids: Ids, vocabulary: int) -> None:
    """Refuse a prompt that no engine can read.

    Raises:
        UsageError: no sequence, no token, or an id outside the vocabulary.
    """
    if ids.ndim != 2 or 0 in ids.shape:
        raise UsageError(
            f"ids of shape {list(ids.shape)}: nothing to read",
            fix="give [batch, tokens] with at least one sequence and one token",
        )
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise UsageError(
            f"ids from {ids.min()} to {ids.max()}: the vocabulary has {vocabulary}",
            fix="use the tokenizer of the same bundle",
        )


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

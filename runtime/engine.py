"""The interface of the backends: a model with a KV cache that the caller does not see.

A model is opened in one of two ways. An `Engine` takes a batch of prompts and decodes all of them
together to the end; every backend has one. A `ServingEngine` has slots, which requests take and
leave between decode steps; a backend has one if its module has `open_slots`.
"""

import pkgutil
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime import engines
from thanos_deploy.bundle.codec import loads
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.errors import InputError, UsageError

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]

# Where the weights are while a model runs: in memory, or in their file, mapped into memory.
Weights = Literal["memory", "map"]


class Engine(Protocol):
    """A causal language model that is ready to run.

    Attributes:
        max_sequence: largest number of tokens of a sequence, prompt and answer together.
    """

    max_sequence: int

    def prefill(self, ids: Ids, mask: Ids | None = None) -> Logits:
        """Clear the KV cache, read a batch of prompts, and return the logits after them.

        Args:
            ids: int64[batch, tokens].
            mask: int64[batch, tokens], 0 for padding, which must be on the left; None if there
                is none.

        Returns:
            float32[batch, vocabulary], the logits after the last token.

        Raises:
            UsageError: there is no sequence or no token, an id is outside the vocabulary, or there
                are more tokens than the engine takes.
        """

    def decode(self, ids: Ids) -> Logits:
        """Append one token to every sequence, and return the logits after it.

        Args:
            ids: int64[batch].

        Returns:
            float32[batch, vocabulary].

        Raises:
            UsageError: the sequences already have the largest length that the engine takes.
        """


class Reading(Protocol):
    """The prefill of newcomers: prompts that are read together, and then become rows of the batch.

    Attributes:
        reused: number of prompt tokens taken from the prefix cache, which are not read again.
    """

    reused: int

    @property
    def left(self) -> int:
        """Number of tokens still to be read, padding included."""

    def read(self, tokens: int) -> Logits | None:
        """Read on; when all tokens are read, the newcomers become the last rows, in their order.

        Args:
            tokens: about how many tokens to read, of all prompts together.

        Returns:
            float32[newcomers, vocabulary], the logits after the prompts; None if some tokens are
            still to be read.
        """

    def abandon(self, newcomer: int) -> None:
        """Drop a newcomer; the last newcomer takes its number."""


class SlotEngine(Protocol):
    """A model with a batch whose rows join and leave between decode steps.

    Attributes:
        max_sequence: largest number of tokens of a row, prompt and answer together.
        vocabulary: number of token ids.
        slots: largest number of rows.
    """

    max_sequence: int
    vocabulary: int
    slots: int

    def remembered(self, prompt: Sequence[int]) -> int:
        """Return how many tokens at the beginning of a prompt are in the prefix cache now."""

    def join(self, prompts: Sequence[Sequence[int]]) -> Reading:
        """Start to read new prompts together, at most as many as there are free slots."""

    def decode(self, ids: Ids) -> Logits:
        """Append one token to every row, and return the logits after it.

        Args:
            ids: int64[rows].

        Returns:
            float32[rows, vocabulary].
        """

    def leave(self, row: int) -> None:
        """Drop a row; the last row takes its number."""

    def clear(self) -> None:
        """Drop all rows, whatever state an exception has left them in; raises nothing.

        A `Reading` that was begun before must not be used after it.
        """


class ServingEngine(SlotEngine, Protocol):
    """A `SlotEngine` that also runs forward passes apart from its rows."""

    def logits(
        self, ids: Ids, mask: Ids | None = None, given_up: Callable[[], bool] = lambda: False
    ) -> Logits:
        """Return the logits after sequences that are not rows of the batch.

        Leaves the rows as they are; may be called on any thread at any time.

        Args:
            ids, mask: as in `Engine.prefill`.
            given_up: called between two pieces of the sequences; returns True if the result is no
                longer wanted.

        Returns:
            float32[batch, vocabulary].

        Raises:
            UsageError: as `Engine.prefill`.
            CancelledError: `given_up` returned True.
        """

    def score(
        self, ids: Sequence[int], given_up: Callable[[], bool] = lambda: False
    ) -> Iterator[Logits]:
        """Yield the logits after every token of a text.

        Leaves the rows as they are; may be called on any thread at any time.

        Args:
            ids: the ids of the text; no special token is added.
            given_up: as in `logits`.

        Yields:
            float32[part, vocabulary], the logits after every token, in order.

        Raises:
            InputError: the model gives the logits after the last token only.
            UsageError: as `Engine.prefill`.
            CancelledError: `given_up` returned True.
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
        provider: the device or execution provider to run on, such as "cpu" or "cuda"; there is no
            fallback to another one.
        threads: number of CPU threads; None for the backend's own choice.
        verify: compare the files with the hashes in the manifest before the backend reads them.

    Raises:
        InputError: the bundle lacks the files that the backend reads, or they cannot be loaded.
        IntegrityError: a file is missing, truncated or changed.
        PlatformError: the backend or the provider is not usable on this machine.
        UsageError: there is no such backend, variant or provider.
    """
    name, _, variant = backend.partition(":")
    module = _module(name)
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


def open_slots(
    bundle: Path,
    *,
    slots: int,
    backend: str = "onnxruntime",
    provider: str = "cpu",
    threads: int | None = None,
    prefix_bytes: int = 0,
    weights: Weights = "map",
    verify: bool = True,
) -> ServingEngine:
    """Load the model of a bundle for continuous batching.

    Args:
        bundle: its folder.
        slots: largest number of sequences at a time.
        backend: one of `backends()` whose module has `open_slots`.
        provider: the device or execution provider to run on; the KV cache is in its memory.
        threads: number of CPU threads; None for the backend's own choice.
        prefix_bytes: size of the prefix cache in the provider's memory, in bytes; see
            `runtime.prefixes`.
        weights: "map" maps the file of the weights into memory, which all processes share; nobody
            may write to the file while it is mapped (see `runtime.server.watched`). "memory" reads
            the file instead.
        verify: compare the files with the hashes in the manifest before the backend reads them.

    Raises:
        InputError: the bundle lacks the files that the backend reads, they cannot be loaded, or the
            logits of a row would depend on the other rows; see `thanos_deploy.model.rope`.
        IntegrityError: a file is missing, truncated or changed.
        PlatformError: the backend or the provider is not usable on this machine.
        UsageError: there is no such backend or provider, the backend has no slots, or `slots` is
            less than 1.
    """
    if slots < 1:
        raise UsageError(
            f"{slots} slots are too few to answer a request", fix="give at least one slot"
        )
    module = _module(backend)
    if not hasattr(module, "open_slots"):
        able = [name for name in backends() if hasattr(_module(name), "open_slots")]
        raise UsageError(
            f"backend {backend} does not support requests that join and leave a running batch",
            fix=f"give one of {', '.join(able)}",
        )
    require_stage(bundle, module, verify=verify)
    opened: ServingEngine = module.open_slots(
        bundle,
        slots=slots,
        provider=provider,
        threads=threads,
        prefix_bytes=prefix_bytes,
        weights=weights,
    )
    return opened


def _module(backend: str) -> ModuleType:
    """The module of a backend.

    Raises:
        UsageError: there is no such backend.
    """
    if backend not in backends():
        raise UsageError(
            f"backend {backend!r} is not known", fix=f"give one of {', '.join(backends())}"
        )
    return import_module(f"runtime.engines.{backend}")


def require_stage(bundle: Path, backend: ModuleType, *, verify: bool) -> None:
    """Refuse a bundle without the files that a backend reads.

    Args:
        bundle: its folder.
        backend: the module of the backend, one of `runtime.engines`.
        verify: compare the files with the hashes in the manifest, too.

    Raises:
        InputError: no finished stage of the bundle wrote them.
        IntegrityError: a file is missing, truncated or changed.
    """
    opened = Bundle.open(bundle)
    folder = backend.folder(opened)
    stages = opened.stages_of(folder)
    if not stages:
        raise InputError(
            f"{bundle}: no finished stage of the bundle wrote {folder}/",
            fix=f"run `{backend.COMMAND.format(bundle=bundle)}` first",
        )
    if verify:
        opened.verify(*stages)


def require_readable(ids: Ids, vocabulary: int) -> None:
    """Refuse a batch of prompts that no engine can read.

    Raises:
        UsageError: there is no sequence or no token, or an id is outside the vocabulary.
    """
    if ids.ndim != 2 or 0 in ids.shape:
        raise UsageError(
            f"ids of shape {list(ids.shape)} have no tokens to read",
            fix="give [batch, tokens] with at least one sequence and one token",
        )
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise UsageError(
            f"ids from {ids.min()} to {ids.max()}: the vocabulary has ids from 0 to "
            f"{vocabulary - 1}",
            fix="use the tokenizer of the same bundle",
        )


def require_room(tokens: int, most: int, *, taker: str, fix: str) -> None:
    """Refuse sequences that are too long.

    Args:
        tokens: number of tokens of the longest sequence.
        most: largest number of tokens that is allowed.
        taker: subject and verb for the message, such as "the model takes".
        fix: what to do about it.

    Raises:
        UsageError: there are more tokens than `most`.
    """
    if tokens > most:
        raise UsageError(f"{tokens} tokens: {taker} at most {most}", fix=fix)


def stop_ids(model: Path) -> frozenset[int]:
    """Ids of the tokens that end a text, from the configuration in a model folder.

    Raises:
        InputError: the configuration is not readable.
    """
    for name in ("generation_config.json", "config.json"):
        path = model / name
        try:
            value = loads(path.read_bytes()).get("eos_token_id")
        except FileNotFoundError:
            continue
        except (ValueError, AttributeError) as error:
            raise InputError(
                f"{path}: not readable ({error})", fix="restore the file from the bundle's origin"
            ) from error
        if value is not None:
            return frozenset(value if isinstance(value, list) else [value])
    return frozenset()

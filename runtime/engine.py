"""What a backend offers: a model, and a kv cache that it keeps to itself.

A model is opened in one of two ways. An `Engine` takes a batch of prompts and steps all of them to
the end; every backend has one. A `ServingEngine` has slots, which requests take and leave between
steps; a backend has one if its module has `open_slots`.
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


class Reading(Protocol):
    """Prompts of newcomers, which are read together until they are rows of the batch.

    Attributes:
        reused: tokens of the prompts that were read before, and need not be read again.
    """

    reused: int

    @property
    def left(self) -> int:
        """Tokens to read, padding included."""

    def read(self, tokens: int) -> Logits | None:
        """Read on; once all is read, the newcomers are the last rows, in their order.

        Args:
            tokens: about how many, of all prompts together.

        Returns:
            float32[newcomers, vocabulary], what follows the prompts; None if some is left to read.
        """

    def abandon(self, newcomer: int) -> None:
        """Forget a newcomer; the last one takes its place."""


class SlotEngine(Protocol):
    """A model that continues the rows of a batch, which join and leave between steps.

    Attributes:
        max_sequence: the most tokens of a row, prompt and answer together.
        vocabulary: how many ids there are.
        slots: the most rows.
    """

    max_sequence: int
    vocabulary: int
    slots: int

    def remembered(self, prompt: Sequence[int]) -> int:
        """How many tokens at the beginning of a prompt need not be read, as it is now."""

    def join(self, prompts: Sequence[Sequence[int]]) -> Reading:
        """Take newcomers, at most as many as slots are free, to be read together."""

    def decode(self, ids: Ids) -> Logits:
        """Append one token to every row and return what follows it.

        Args:
            ids: int64[rows].

        Returns:
            float32[rows, vocabulary].
        """

    def leave(self, row: int) -> None:
        """Forget a row; the last one takes its place."""

    def clear(self) -> None:
        """Forget everything, in whatever state an exception has left it; raises nothing.

        No reading goes on after it.
        """


class ServingEngine(SlotEngine, Protocol):
    """Slots, and forward passes beside them."""

    def logits(
        self, ids: Ids, mask: Ids | None = None, given_up: Callable[[], bool] = lambda: False
    ) -> Logits:
        """What follows other sequences, which leave no trace; on any thread, at any time.

        Args:
            ids, mask: as in `Engine.prefill`.
            given_up: asked between two pieces of the sequences: nobody waits for the result.

        Returns:
            float32[batch, vocabulary].

        Raises:
            UsageError: as `Engine.prefill`.
            CancelledError: it was given up.
        """

    def score(
        self, ids: Sequence[int], given_up: Callable[[], bool] = lambda: False
    ) -> Iterator[Logits]:
        """What follows every token of a text, which leaves no trace; on any thread, at any time.

        Args:
            ids: the text, as it stands.
            given_up: as in `logits`.

        Yields:
            float32[part, vocabulary], the logits after every token, in order.

        Raises:
            InputError: the model gives the logits after the last token only.
            UsageError: as `Engine.prefill`.
            CancelledError: it was given up.
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
    """Load the model of a bundle for several sequences that come and go.

    Args:
        bundle: its folder.
        slots: the most sequences at a time.
        backend: one of `backends()` that has slots.
        provider: what the backend is to run on, and whose memory the kv cache is in.
        threads: how many compute on a CPU; None for the backend's own choice.
        prefix_bytes: of the provider's memory, to keep beginnings of prompts in; see
            `runtime.prefixes`.
        weights: what is mapped takes memory once for all processes that map it, and must not be
            written to; see `runtime.server.watched`.
        verify: compare the files with the hashes in the manifest before the backend reads them.

    Raises:
        InputError: the bundle lacks what the backend reads, it cannot be loaded, or its rows would
            not get what they get alone; see `thanos_deploy.model.rope`.
        IntegrityError: a file is missing, truncated or changed.
        PlatformError: the backend or the provider is not usable on this machine.
        UsageError: there is no such backend or provider, the backend has no slots, or none is asked
            for.
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
            f"{bundle}: no finished stage of the bundle wrote {folder}/",
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
        tokens: of the longest sequence.
        most: the most that are taken.
        taker: what takes no more, as the message begins: "the model takes".
        fix: what to do about it.

    Raises:
        UsageError: they are too long.
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

"""PyTorch and transformers, on the checkpoint of a bundle: the baseline for the exports.

Variants, given as `backend="torch:VARIANT"`:

    eager             transformers as it is
    compiled          the same through torch.compile, with dynamic shapes
    cutlass           2:4 weights as torch's semi-structured tensors, multiplied by CUTLASS
    cusparselt        2:4 weights multiplied by cuSPARSELt, with the algorithm it finds fastest
    cusparselt-first  the same with its first algorithm, as torch uses it, for comparison
    triton            2:4 weights through this project's Triton kernels
    mma-sp            2:4 weights through this project's kernel in CUDA C++
    sparse            2:4 weights through the kernel (one of these, or the dense product) measured
                      as fastest for the layer and the number of tokens; see
                      `runtime.kernels.choice`
    blockwise         2:4 weights on a CPU, unpacked some rows at a time: less memory, more work

All variants but the first two replace the linear layers of the blocks. These variants need an
NVIDIA GPU, except `blockwise`, which needs a CPU. All 2:4 products are one operator of PyTorch,
which the plugin for vLLM calls too; see `runtime.kernels.operator`. On a CPU the weights are
float32; on a GPU they are bfloat16 if those of the checkpoint are, and float16 otherwise.

On a GPU all variants but `compiled` use a static KV cache, and their steps are replayed from CUDA
graphs; see `runtime.static`. A CPU has no kernel launches to save, and would have to multiply with
the empty places of a static cache, so the cache grows there, unless the caller asks for a `Room`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from runtime.engine import Ids, Logits, require_readable, require_room
from runtime.static.room import Room
from thanos_deploy.bundle.layout import ENGINES, MODEL
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.errors import PlatformError, UsageError
from thanos_deploy.model.rope import Change, change_of

COMMAND = "thanos-deploy prune MODEL -o {bundle} ..."
VARIANTS = (
    "eager",
    "compiled",
    "cutlass",
    "cusparselt",
    "cusparselt-first",
    "triton",
    "mma-sp",
    "sparse",
    "blockwise",
)
PROVIDERS = ("cpu", "cuda")

# Default size of the static KV cache on a GPU; it grows when needed.
_ROOM = Room(batch=1, tokens=1024)


class Steps(Protocol):
    """The forward passes of a model, with the KV cache of its current sequences."""

    @property
    def length(self) -> int:
        """Number of tokens of each sequence, padding included."""

    def prefill(self, ids: Ids, mask: Ids | None) -> Any:
        """See `Engine.prefill`; a tensor float32[batch, vocabulary] on the model's device."""

    def decode(self, ids: Ids) -> Any:
        """See `Engine.decode`; a tensor float32[batch, vocabulary] on the model's device."""


class TorchEngine:
    """An engine on a model of transformers; `engine_of` makes it.

    Attributes:
        max_sequence: largest number of tokens of a sequence, prompt and answer together.
    """

    def __init__(
        self, steps: Steps, *, vocabulary: int, max_sequence: int, change: Change | None = None
    ) -> None:
        """Wrap steps with the checks of an engine, and with the copy of the logits to the host."""
        self._change = change
        self._lengths = np.zeros(0, np.int64)
        self._steps = steps
        self._vocabulary = vocabulary
        self.max_sequence = max_sequence

    def prefill(self, ids: Ids, mask: Ids | None = None) -> Logits:
        """See `Engine.prefill`."""
        require_readable(ids, self._vocabulary)
        self._require_room(ids.shape[1])
        self._lengths = (np.ones_like(ids) if mask is None else mask).sum(axis=1)
        self._require_alike()
        return _to_host(self._steps.prefill(ids, mask))

    def decode(self, ids: Ids) -> Logits:
        """See `Engine.decode`."""
        self._require_room(self._steps.length + 1)
        self._lengths = self._lengths + 1
        self._require_alike()
        return _to_host(self._steps.decode(ids))

    def _require_alike(self) -> None:
        if self._change is not None:
            self._change.require_alike(self._lengths)

    def _require_room(self, tokens: int) -> None:
        require_room(
            tokens,
            self.max_sequence,
            taker="the model takes",
            fix="use a shorter prompt or fewer new tokens",
        )


class _GrowingSteps:
    """Steps on transformers' own cache, which grows by one token per step."""

    def __init__(self, model: Any, *, compiled: bool) -> None:
        import torch

        self._torch = torch
        self._device = model.device
        # fullgraph: without it, PyTorch runs uncompiled what it cannot compile, with no error.
        self._model = torch.compile(model, dynamic=True, fullgraph=True) if compiled else model
        self._cache: Any = None
        self._mask: Any = None

    @property
    def length(self) -> int:
        """See `Steps`."""
        return int(self._mask.shape[1])

    def prefill(self, ids: Ids, mask: Ids | None) -> Any:
        """See `Steps`."""
        from transformers import DynamicCache

        tokens = self._place(ids)
        self._mask = self._torch.ones_like(tokens) if mask is None else self._place(mask)
        # Made without the model's configuration, so that no block's cache is cut to its window.
        self._cache = DynamicCache()
        return self._step(tokens)

    def decode(self, ids: Ids) -> Any:
        """See `Steps`."""
        tokens = self._place(ids[:, None])
        self._mask = self._torch.cat([self._mask, self._torch.ones_like(tokens)], dim=1)
        return self._step(tokens)

    def _step(self, tokens: Any) -> Any:
        positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        with self._torch.inference_mode():
            output = self._model(
                input_ids=tokens,
                attention_mask=self._mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return output.logits[:, -1].float()

    def _place(self, array: Ids) -> Any:
        return self._torch.tensor(array, device=self._device)


def _to_host(logits: Any) -> Logits:
    """Copy logits to the host, through pinned memory if they are on a GPU."""
    import torch

    host = torch.empty(logits.shape, dtype=torch.float32, pin_memory=logits.is_cuda)
    host.copy_(logits, non_blocking=True)
    if logits.is_cuda:
        torch.cuda.current_stream(logits.device).synchronize()
    copied: Logits = host.numpy()
    return copied


def folder(bundle: Bundle) -> str:
    """Return the name of the folder in a bundle that holds the checkpoint."""
    return "model"


def open_engine(
    bundle: Path,
    *,
    provider: str = "cpu",
    variant: str = "eager",
    threads: int | None = None,
    room: Room | None = None,
) -> TorchEngine:
    """Load the checkpoint of a bundle; see `open_model`."""
    return open_model(
        bundle / MODEL,
        provider=provider,
        variant=variant,
        threads=threads,
        room=room,
        keep=bundle / ENGINES,
    )


def open_model(
    folder: Path,
    *,
    provider: str = "cpu",
    variant: str = "eager",
    threads: int | None = None,
    room: Room | None = None,
    keep: Path | None = None,
) -> TorchEngine:
    """Load a model folder, such as that of a dense model for comparison.

    Args:
        folder: a Hugging Face folder.
        provider: one of `PROVIDERS`.
        variant: one of `VARIANTS`.
        threads: number of CPU threads for one operator, set for the whole process; None for
            PyTorch's choice.
        room: see `engine_of`.
        keep: see `engine_of`.

    Raises:
        PlatformError: a package or the GPU that the variant needs is missing.
        InputError: the checkpoint does not load, or a linear layer is not one that a 2:4 variant
            supports; the message names the layer.
        ResourceError: the GPU has too little memory.
        UsageError: there is no such provider.
    """
    if provider not in PROVIDERS:
        raise UsageError(
            f"provider {provider!r} is not known", fix=f"give one of {', '.join(PROVIDERS)}"
        )
    torch = _require_torch()
    _require_device(torch, provider, variant)
    if threads is not None:
        torch.set_num_threads(threads)
    from runtime.static import memory
    from thanos_deploy.model.checkpoint import Checkpoint
    from thanos_deploy.model.load import load_model
    from thanos_deploy.model.rounding import cast

    checkpoint = Checkpoint.open(folder)
    model = load_model(checkpoint.folder)
    if provider == "cuda":
        is_bfloat16 = checkpoint.config.dtype == torch.bfloat16
        cast(model, torch.bfloat16 if is_bfloat16 else torch.float16)
    size = sum(parameter.nbytes for parameter in model.parameters())
    with memory.needed(f"loading {folder}, which takes at least {size} bytes"):
        model.to(torch.device(provider))
    return engine_of(model, checkpoint.linears, variant=variant, room=room, keep=keep)


def engine_of(
    model: Any,
    linears: Iterable[str],
    *,
    variant: str = "eager",
    room: Room | None = None,
    keep: Path | None = None,
) -> TorchEngine:
    """Make an engine of a causal language model of transformers, on the device where it is.

    Args:
        model: the model, ready for inference; a 2:4 variant replaces some of its layers.
        linears: full names of the linear layers that a 2:4 variant replaces.
        variant: one of `VARIANTS`.
        room: size of a static KV cache, which grows when more is needed; None for a default size on
            a GPU, and for a growing cache elsewhere.
        keep: the folder below which variant `sparse` keeps its measurements; None for the cache
            folder of thanos-deploy.

    Raises:
        PlatformError: the model's device is not what the variant needs.
        InputError: a layer is not one that a 2:4 variant supports; the message names it.
        ResourceError: the GPU has too little memory.
        UsageError: the room has more tokens than the model's longest sequence.
    """
    torch = _require_torch()
    provider, most_tokens = model.device.type, model.config.max_position_embeddings
    _require_device(torch, provider, variant)
    if room is not None and room.tokens > most_tokens:
        raise UsageError(
            f"a KV cache for {room.tokens} tokens: the model takes at most {most_tokens} tokens",
            fix="ask for at most that many tokens",
        )
    _exchange(model, tuple(linears), variant, keep)
    steps: Steps
    if variant == "compiled" or (room is None and provider == "cpu"):
        steps = _GrowingSteps(model, compiled=variant == "compiled")
    else:
        from runtime.static.steps import StaticSteps

        usual = Room(_ROOM.batch, min(_ROOM.tokens, most_tokens))
        steps = StaticSteps(model, room or usual)
    return TorchEngine(
        steps,
        vocabulary=model.config.vocab_size,
        max_sequence=most_tokens,
        change=change_of(model.config.to_dict()),
    )


def _exchange(model: Any, names: Sequence[str], variant: str, keep: Path | None) -> None:
    """Replace the linear layers of a model with those of a variant."""
    if variant in ("eager", "compiled"):
        return

    from runtime.kernels import choice, kernel_times, linears

    if variant != "sparse":
        linears.replace(model, names, variant)
        return
    rows = kernel_times.rows_here(choice.shapes_of(model, names), model.device, keep)
    choice.replace(model, names, rows)


def _require_torch() -> Any:
    """Return the module torch, if it and transformers are installed."""
    try:
        import torch
        import transformers  # noqa: F401 - imported here for the error message below
    except ImportError as error:
        raise PlatformError(
            f"the package {error.name} is not installed", fix="pip install torch transformers"
        ) from error
    return torch


def _require_device(torch: Any, provider: str, variant: str) -> None:
    """Refuse a variant that this machine cannot run."""
    if provider == "cuda" and not torch.cuda.is_available():
        raise PlatformError(
            "provider cuda: PyTorch finds no NVIDIA GPU",
            fix="check the driver with nvidia-smi, and that PyTorch is a CUDA build",
        )
    if variant in ("eager", "compiled"):
        return
    if provider != "cuda" and variant != "blockwise":
        raise PlatformError(
            f"variant {variant} runs on an NVIDIA GPU only",
            fix="open it with provider cuda on a machine that has one, or take eager or compiled",
        )
    from runtime.kernels import linears

    linears.require(variant, torch.device(provider))

"""PyTorch and transformers, on the checkpoint of a bundle: what an export has to beat.

Variants, given as `backend="torch:VARIANT"`:

    eager             transformers as it is
    compiled          the same through torch.compile, with dynamic shapes
    cutlass           2:4 weights as torch's semi-structured tensors, multiplied by CUTLASS
    cusparselt        2:4 weights multiplied by cuSPARSELt, with the algorithm it finds fastest
    cusparselt-first  the same with its first algorithm, as torch takes it, to compare with
    triton            2:4 weights through this project's Triton kernels
    mma-sp            2:4 weights through this project's kernel in CUDA C++

The last five change the linear layers of the blocks and need an NVIDIA GPU. On the CPU weights are
float32; on a GPU bfloat16, if the checkpoint's are, or else float16.
"""

from pathlib import Path
from typing import Any

from runtime.engine import Ids, Logits, require_readable
from thanos_deploy import gpu
from thanos_deploy.artifact import Bundle
from thanos_deploy.errors import PlatformError, UsageError

COMMAND = "thanos-deploy prune MODEL -o {bundle} ..."
VARIANTS = (
    "eager",
    "compiled",
    "cutlass",
    "cusparselt",
    "cusparselt-first",
    "triton",
    "mma-sp",
)
PROVIDERS = ("cpu", "cuda")


class TorchEngine:
    """A model and the kv cache of the sequences that it is working on.

    Attributes:
        max_sequence: the most tokens, prompt and answer together.
    """

    def __init__(self, model: Any, torch: Any, *, compiled: bool = False) -> None:
        """Wrap a model of transformers, on the device where it is.

        Args:
            model: the causal model, ready for inference.
            torch: the module.
            compiled: run it through torch.compile.
        """
        self._model = model
        if compiled:
            # A full graph or an error: PyTorch would go on uncompiled where it gives up.
            self._model = torch.compile(model, dynamic=True, fullgraph=True)
        self._torch = torch
        self._device = model.device
        self._vocabulary = model.config.vocab_size
        self.max_sequence: int = model.config.max_position_embeddings
        self._cache: Any = None
        self._mask: Any = None

    def prefill(self, ids: Ids, mask: Ids | None = None) -> Logits:
        """See `Engine.prefill`."""
        from transformers import DynamicCache

        require_readable(ids, self._vocabulary)
        self._require_room(ids.shape[1])
        tokens = self._place(ids)
        self._mask = self._torch.ones_like(tokens) if mask is None else self._place(mask)
        # Without the configuration no block's cache is cut to its window.
        self._cache = DynamicCache()
        return self._step(tokens)

    def decode(self, ids: Ids) -> Logits:
        """See `Engine.decode`."""
        self._require_room(self._mask.shape[1] + 1)
        tokens = self._place(ids[:, None])
        self._mask = self._torch.cat([self._mask, self._torch.ones_like(tokens)], dim=1)
        return self._step(tokens)

    def _require_room(self, tokens: int) -> None:
        if tokens > self.max_sequence:
            raise UsageError(
                f"{tokens} tokens: the model takes at most {self.max_sequence}",
                fix="use a shorter prompt or fewer new tokens",
            )

    def _step(self, tokens: Any) -> Logits:
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
        logits: Logits = output.logits[:, -1].float().cpu().numpy()
        return logits

    def _place(self, array: Ids) -> Any:
        return self._torch.tensor(array, device=self._device)


def folder(bundle: Bundle) -> str:
    """The part of a bundle with the checkpoint."""
    return "model"


def open_engine(
    bundle: Path, *, provider: str = "cpu", variant: str = "eager", threads: int | None = None
) -> TorchEngine:
    """Load the checkpoint of a bundle; see `open_model`."""
    return open_model(bundle / "model", provider=provider, variant=variant, threads=threads)


def open_model(
    folder: Path, *, provider: str = "cpu", variant: str = "eager", threads: int | None = None
) -> TorchEngine:
    """Load a model folder, such as a dense model to compare with.

    Args:
        folder: a Hugging Face folder.
        provider: one of `PROVIDERS`.
        variant: one of `VARIANTS`.
        threads: how many work on one operator, in this whole process; None for PyTorch's choice.

    Raises:
        PlatformError: a package or the GPU that the variant needs is not there.
        InputError: the checkpoint does not load, or a linear layer is not what a variant for 2:4
            takes; the message names it.
        UsageError: there is no such provider.
    """
    if provider not in PROVIDERS:
        raise UsageError(
            f"provider {provider!r} is not known", fix=f"give one of {', '.join(PROVIDERS)}"
        )
    torch = _require_torch(provider, variant)
    if threads is not None:
        torch.set_num_threads(threads)
    from runtime.kernels import linears
    from thanos_deploy.checkpoint import Checkpoint, cast, load_model

    checkpoint = Checkpoint.open(folder)
    model = load_model(checkpoint.folder)
    if provider == "cuda":
        is_bfloat16 = checkpoint.config.dtype == torch.bfloat16
        cast(model, torch.bfloat16 if is_bfloat16 else torch.float16)
    model.to(torch.device(provider))
    if variant in linears.MAKERS:
        linears.replace(model, checkpoint.linears, variant)
    return TorchEngine(model, torch, compiled=variant == "compiled")


def _require_torch(provider: str, variant: str) -> Any:
    """PyTorch, if it and this machine can do what is asked for."""
    try:
        import torch
        import transformers  # noqa: F401 - asked for here, so that the message is the same
    except ImportError as error:
        raise PlatformError(
            f"the package {error.name} is not installed", fix="pip install torch transformers"
        ) from error
    if provider == "cuda" and not torch.cuda.is_available():
        raise PlatformError(
            "provider cuda: PyTorch finds no NVIDIA GPU",
            fix="check the driver with nvidia-smi, and that PyTorch is a CUDA build",
        )
    if variant in ("eager", "compiled"):
        return torch
    if provider != "cuda":
        raise PlatformError(
            f"variant {variant} runs on an NVIDIA GPU only",
            fix="open it with provider cuda on a machine that has one, or take eager or compiled",
        )
    capability = torch.cuda.get_device_capability()
    if capability < gpu.SPARSE_CAPABILITY:
        raise PlatformError(
            f"variant {variant}: the GPU has compute capability {capability[0]}.{capability[1]}",
            fix="use a GPU of compute capability 8.0 or later",
        )
    if variant == "cusparselt" and not torch.backends.cusparselt.is_available():
        raise PlatformError(
            "variant cusparselt: this build of PyTorch has no cuSPARSELt",
            fix="use a CUDA build of PyTorch with it, or variant cutlass",
        )
    if variant == "triton":
        try:
            import triton  # noqa: F401 - its absence is told here
        except ImportError as error:
            raise PlatformError(
                "the package triton is not installed", fix="pip install 'thanos-deploy[kernels]'"
            ) from error
    return torch

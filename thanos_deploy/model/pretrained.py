"""Load models with transformers, without running code of the model and without a download.

Data sets of the hub are read here too. Their code does not run either, but they may be downloaded.

A checkpoint can bring Python of its own (`auto_map` in its JSON files, `custom_generate/`), or name
attention kernels that a library fetches from a hub and runs. transformers asks on the terminal
whether to run the model's own Python, unless it is told not to; every call here tells it not to. A
model whose architecture is part of transformers loads without its own code. Any other is refused.
`tests/thanos_deploy/model/test_pretrained.py` checks that no other module calls a function that
could run such code, which is why this file is longer than others.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import init_empty_weights
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights

from thanos_deploy.bundle import files
from thanos_deploy.bundle.codec import loads
from thanos_deploy.bundle.files import Json
from thanos_deploy.errors import (
    CalibrationError,
    DeployError,
    ModelError,
    PlatformError,
    boundary,
    summary,
)
from thanos_deploy.model import tokenizer_files

ADAPTER = "adapter_config.json"

# Entries of config.json about weights that are not stored as floats.
STORAGE = ("quantization_config", "compression_config")


def require_generation_config(folder: Path) -> None:
    """Refuse an invalid generation_config.json; a folder need not have one.

    Raises:
        ModelError: it is not a JSON object, or `eos_token_id` is not a token id or a list of them.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return
    with boundary(
        ModelError,
        f"{path}: not a readable generation configuration",
        fix="restore the file from the model's origin, or remove it",
    ):
        entries = loads(path.read_bytes())
        if not isinstance(entries, dict):
            raise ValueError(f"a {type(entries).__name__} in place of an object")
        ends = entries.get("eos_token_id")
        for end in ends if isinstance(ends, list) else [ends]:
            if end is not None and type(end) is not int:
                raise ValueError(f"eos_token_id is {ends!r}")


def load_config(folder: Path) -> PretrainedConfig:
    """Load the configuration of a model folder.

    Entries about quantised storage are dropped, as only float weights are read. The attention
    implementation is left to the library, because the configuration may name a kernel on a hub.

    Raises:
        OSError, ValueError and others of the library: the file is missing or not readable.
    """
    config: PretrainedConfig = AutoConfig.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    config._attn_implementation = None
    # Left over if the floats were made from a quantised checkpoint; quantised weights are refused.
    for key in STORAGE:
        if hasattr(config, key):
            delattr(config, key)
    return config


def make_model(config: PretrainedConfig) -> PreTrainedModel:
    """Make a causal model with the library's initial weights."""
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return made


def make_skeleton(config: PretrainedConfig, *, buffers: bool = True) -> PreTrainedModel:
    """Make a causal model whose parameters have no storage.

    Args:
        config: configuration of the model.
        buffers: whether buffers have storage and values.
    """
    # Without storage no initial values are needed, and computing them takes most of the time.
    with init_empty_weights(include_buffers=not buffers), no_init_weights():
        made = make_model(config)
    made.tie_weights()  # removing the storage separated tied parameters
    return made


def load_model(
    folder: Path, own: type[PreTrainedModel] | None = None
) -> tuple[PreTrainedModel, list[str]]:
    """Load the causal model of a folder in float32 from its safetensors files.

    Args:
        folder: the model folder.
        own: class of the model; None for the class that the library chooses.

    Returns:
        the model, and the sorted names of the weights that the files lack. The library gives these
        initial values.

    Raises:
        ModelError: the model does not load, or not without code of its own.
    """
    require_no_adapter(folder)
    loader: Any = own or AutoModelForCausalLM
    with _refusing(folder, "the model does not load", "config.json"):
        model, information = loader.from_pretrained(
            folder,
            config=load_config(folder),
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    return model, sorted(information["missing_keys"])


def require_no_adapter(folder: Path) -> None:
    """Refuse a folder with an adapter: the library would load the base model that it names.

    Raises:
        ModelError: the folder has an adapter.
    """
    if (folder / ADAPTER).exists():
        raise ModelError(
            f"{folder / ADAPTER}: this file belongs to an adapter, and the base model "
            "would be loaded from the place that it names",
            fix="merge the adapter into its base model, save that, and remove this file",
        )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, which must be based on the package tokenizers.

    If the tokenizer names a class of its own, the library's generic class is made from
    tokenizer.json instead. Without a tokenizer.json, the library converts the older files.

    Raises:
        ModelError: no tokenizer loads without code of its own, or it is of another package.
        PlatformError: a package that reads the older files cannot be used.
    """
    own = (folder / tokenizer_files.TOKENIZER).is_file()
    alone = own and _code(folder / "tokenizer_config.json")
    if not own and (pieces := sorted(folder.glob("*.model"))):
        _require_sentencepiece(pieces[0])
    loader: Any = PreTrainedTokenizerFast if alone else AutoTokenizer
    with _refusing(folder, "no tokenizer that can be loaded", "tokenizer_config.json"):
        tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        tokenizer("a")  # the library reads some entries only when it tokenises the first text
    if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
        raise ModelError(
            f"{folder}: the tokenizer is a {type(tokenizer).__name__}, which is not based "
            "on the package tokenizers, so no tokenizer.json can be written",
            fix="put the model's tokenizer.json there",
        )
    return tokenizer


def _require_sentencepiece(path: Path) -> None:
    """Refuse a SentencePiece model that cannot be read here.

    Without the packages, the library would take the file for another format and report that
    format's package as missing.

    Raises:
        PlatformError: a package is missing, or does not fit another one.
    """
    with boundary(
        PlatformError,
        f"{path}: the tokenizer is a SentencePiece model, and there is no tokenizer.json; the "
        "packages sentencepiece and protobuf, which read it, cannot be used",
        fix="pip install 'thanos-deploy[sentencepiece]', or put the model's tokenizer.json there",
    ):
        import sentencepiece  # noqa: F401
        from transformers.convert_slow_tokenizer import import_protobuf

        import_protobuf()


def settle_tokenizer(folder: Path) -> None:
    """Write the rules that a tokenizer gets from the library into the files of a model's copy.

    transformers builds some tokenizers anew, after a class that tokenizer_config.json or the type
    of the model names, with rules and special tokens that are in no file. A reader without
    transformers, such as `tokenizer_files`, must come to the same ids.

    So tokenizer.json is rewritten if it gives other ids, if it truncates or pads texts, or if there
    are only older files such as merges.txt. Special tokens that the files lack are added to
    tokenizer_config.json. Nothing happens if the tokenizer does not load: the code that needs it
    reports the error.

    Args:
        folder: the copy, which is changed in place.
    """
    path = folder / tokenizer_files.TOKENIZER
    try:
        tokenizer = load_tokenizer(folder)
    except (ModelError, PlatformError):
        return
    whole = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    whole.no_truncation()
    whole.no_padding()
    written = loads(path.read_bytes()) if path.is_file() else None
    if (
        written is None
        or written.get("truncation")
        or written.get("padding")
        or _rules(tokenizer_files.load(folder)) != _rules(whole)
    ):
        path.write_text(whole.to_str(pretty=True), encoding="utf-8")
    known = tokenizer_files.special_tokens(folder)
    special = tokenizer.special_tokens_map.items()
    if unsaid := {name: token for name, token in special if known.get(name) != token}:
        configuration = folder / tokenizer_files.CONFIGURATION
        said = loads(configuration.read_bytes()) if configuration.is_file() else {}
        files.write_json(configuration, {**said, **unsaid})


def _rules(tokenizer: Tokenizer) -> Json:
    """Return all rules that decide on ids; no post-processor if it adds no special tokens."""
    rules: Json = loads(tokenizer.to_str())
    around = rules["post_processor"]
    if around and around["type"] == "TemplateProcessing" and not around["special_tokens"]:
        rules["post_processor"] = None
    return rules


def load_gguf(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model in a GGUF file, dequantised to float32, and its tokenizer.

    Other files in the same folder are not read.

    Raises:
        ModelError: the header describes another model than the tensors of the file.
        Exception: of any type, from the library, for a file that it cannot read.
    """
    loader: Any = AutoModelForCausalLM
    with TemporaryDirectory() as alone:
        (Path(alone) / gguf.name).symlink_to(gguf.resolve())
        with _gguf_read_once():
            _require_gguf_weights(gguf, Path(alone))
            # Without dequantize=True the loaded model refuses to be saved.
            with redirect_stderr(StringIO()):  # a progress bar that cannot be switched off
                model, information = loader.from_pretrained(
                    alone,
                    gguf_file=gguf.name,
                    dtype=torch.float32,
                    quantization_config=GgufConfig(dequantize=True),
                    output_loading_info=True,
                    trust_remote_code=False,
                    local_files_only=True,
                )
            # The library would give these initial values.
            if wrong := sorted(
                [*information["missing_keys"], *(key for key, *_ in information["mismatched_keys"])]
            ):
                raise _another_gguf(gguf, f"{wrong[0]} is missing or has another shape")
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                alone, gguf_file=gguf.name, trust_remote_code=False, local_files_only=True
            )
    return model, tokenizer


def _require_gguf_weights(gguf: Path, alone: Path) -> None:
    """Refuse a file whose header describes more weights than the file has.

    The library would allocate the described model before it compares any shape.

    Raises:
        ModelError: the file has fewer weights than its header describes.
    """
    from gguf import GGUFReader

    config = AutoConfig.from_pretrained(
        alone, gguf_file=gguf.name, trust_remote_code=False, local_files_only=True
    )
    tensors = GGUFReader(str(alone / gguf.name)).tensors
    described = sum(one.numel() for one in make_skeleton(config, buffers=False).parameters())
    held = sum(int(one.n_elements) for one in tensors)
    if described > held:
        raise _another_gguf(gguf, f"it has {held} weights, for {described}")


def _another_gguf(gguf: Path, why: str) -> ModelError:
    return ModelError(
        f"{gguf}: its tensors are not those of the model that its head describes ({why})",
        fix="download the file again and compare its hash",
    )


@contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Cache the parsing of GGUF files and their lists of tensor names within a `with` statement.

    transformers parses the whole file three times (for the configuration, the weights and the
    tokenizer), value by value, and lists the names of all tensors anew for every module of the
    model. No caller changes the cached objects.
    """
    import gguf  # an optional package, see `convert.convert_gguf`

    taken = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, original in taken.items():
        setattr(gguf, name, cache(original))
    try:
        yield
    finally:
        for name, original in taken.items():
            setattr(gguf, name, original)


def load_rows(name: str, config: str, split: str, file: str) -> list[object]:
    """Return the rows of a data set of the hub, from the local cache if they are there.

    Args:
        name: name of the data set's repository, or a folder.
        config: one of the configurations of the data set; empty for its default.
        split: name of the split.
        file: the only data file to read; empty for all files of the split.

    Raises:
        PlatformError: the package datasets is not installed.
        CalibrationError: there is no such data set, or it can neither be found in the cache nor
            downloaded.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise PlatformError(
            f"{name}: reading data sets of the hub needs the package datasets",
            fix="pip install 'thanos-deploy[data]', or give a file",
        ) from error
    with boundary(
        CalibrationError,
        f"{name}: the split {split} {f'of {config} ' if config else ''}cannot be read",
        fix="check the names of the data set and the split; without a network, the data set "
        "has to be in the local cache of the hub",
    ):
        return list(
            load_dataset(
                name,
                config or None,
                split=split,
                data_files={split: file} if file else None,
                trust_remote_code=False,
            )
        )


@contextmanager
def _refusing(folder: Path, what: str, file: str) -> Iterator[None]:
    """Turn any exception that the library raises for a folder into a `ModelError` with a fix."""
    try:
        yield
    except (DeployError, MemoryError):
        raise
    # The library indexes and calls whatever the files say, so they can make it raise any exception.
    except Exception as error:
        if code := _code(folder / file):
            raise ModelError(
                f"{folder / file}: loading this file would run code that comes with the "
                f"model ({code}), and such code is never run",
                fix="use a model of a supported type whose tokenizer is saved as tokenizer.json",
            ) from error
        raise ModelError(
            f"{folder}: {what} ({summary(error)})",
            fix="put the model's tokenizer.json and tokenizer_config.json there"
            if file.startswith("tokenizer")
            else "check the folder with `thanos-deploy prune --dry-run`, or fetch it again",
        ) from error


def _code(path: Path) -> str:
    """Return the model's own code that a JSON file names; empty if there is none."""
    named = files.peek_json(path).get("auto_map")
    return json.dumps(named) if named else ""

"""The one place where transformers reads a model: its code never runs, and nothing is downloaded.

Data sets of a hub are read here too, whose code does not run either; these may be downloaded.

A checkpoint can bring Python of its own (`auto_map` in its JSON files, `custom_generate/`), or name
attention kernels that a library fetches from a hub and runs. transformers asks on the terminal
whether to run the former unless it is told not to. All that is called here is told so. A model
whose architecture is the library's own loads without its code; what does not is refused.
`tests/thanos_deploy/test_pretrained.py` sees to it that nothing else calls `from_pretrained`.
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

# What config.json says of weights that are stored in other ways than in floats.
STORAGE = ("quantization_config", "compression_config")


def require_generation_config(folder: Path) -> None:
    """Refuse a generation_config.json that nothing could generate by.

    Raises:
        ModelError: it is no JSON object, or its ends of a text are no ids of tokens.
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
    """The configuration in a model folder.

    It says nothing of how weights are stored, as only floats are read. What computes attention is
    left to the library's choice, whatever the configuration says: there it may name a kernel on a
    hub.

    Raises:
        OSError, ValueError and others of the library: it is missing or not readable.
    """
    config: PretrainedConfig = AutoConfig.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    config._attn_implementation = None
    # Left over from the checkpoint that the floats were made from; other weights are refused.
    for key in STORAGE:
        if hasattr(config, key):
            delattr(config, key)
    return config


def make_model(config: PretrainedConfig) -> PreTrainedModel:
    """A causal model with the library's own initial weights."""
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return made


def make_skeleton(config: PretrainedConfig, *, buffers: bool = True) -> PreTrainedModel:
    """A causal model whose parameters have no storage.

    Args:
        config: of the model.
        buffers: they have storage, and values.
    """
    # What has no storage needs no initial values, and computing them takes most of the time.
    with init_empty_weights(include_buffers=not buffers), no_init_weights():
        made = make_model(config)
    made.tie_weights()  # without storage every parameter has become one of its own
    return made


def load_model(
    folder: Path, own: type[PreTrainedModel] | None = None
) -> tuple[PreTrainedModel, list[str]]:
    """The causal model in a folder, in float32, from its safetensors files.

    Args:
        folder: the model.
        own: its class; None for the library's.

    Returns:
        the model, and the sorted names of the weights that the files lack, which are made up.

    Raises:
        ModelError: it does not load, or not without code of its own.
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
    """Refuse a folder with an adapter, which the library would follow to another model.

    Raises:
        ModelError: it has one.
    """
    if (folder / ADAPTER).exists():
        raise ModelError(
            f"{folder / ADAPTER}: this file belongs to an adapter, and the base model "
            "would be loaded from the place that it names",
            fix="merge the adapter into its base model, save that, and remove this file",
        )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, of the package tokenizers.

    Where it names a class of its own, tokenizer.json is what the library's class is made from.
    Where there is no tokenizer.json, the library makes it from the older files.

    Raises:
        ModelError: there is none that loads without code of its own.
        PlatformError: the older files are read by a package that is not installed.
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
        tokenizer("a")  # some of what the files say is looked at with the first text only
    if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
        raise ModelError(
            f"{folder}: the tokenizer is a {type(tokenizer).__name__}, which is not based "
            "on the package tokenizers, so no tokenizer.json can be written",
            fix="put the model's tokenizer.json there",
        )
    return tokenizer


def _require_sentencepiece(path: Path) -> None:
    """Refuse a SentencePiece model that cannot be read here.

    The library would take it for another format then, and miss the package for that.

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
    """State in a copy of a model what its tokenizer's files leave to the library that reads them.

    The library builds some tokenizers anew, after a class that tokenizer_config.json or the type
    of the model names, with rules and special tokens that are in no file. Whoever reads the files
    without it, as `tokenizer_files` does, is to come to the same ids. So tokenizer.json and
    tokenizer_config.json are written again where that would not be so, where tokenizer.json cuts or
    pads texts, and where there are only the files that are older than it, such as merges.txt. A
    tokenizer that does not load is left to whoever needs it.
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
    """All that decides on ids; one way to say that nothing is put around a text."""
    rules: Json = loads(tokenizer.to_str())
    around = rules["post_processor"]
    if around and around["type"] == "TemplateProcessing" and not around["special_tokens"]:
        rules["post_processor"] = None
    return rules


def load_gguf(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in a GGUF file, dequantised to float32, and its tokenizer.

    Nothing that lies beside the file is looked at.

    Raises:
        ModelError: its head describes another model than its tensors make.
        whatever the library raises for a file that it cannot read.
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
            # The library would make these up.
            if wrong := sorted(
                [*information["missing_keys"], *(key for key, *_ in information["mismatched_keys"])]
            ):
                raise _another_gguf(gguf, f"{wrong[0]} is missing or has another shape")
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                alone, gguf_file=gguf.name, trust_remote_code=False, local_files_only=True
            )
    return model, tokenizer


def _require_gguf_weights(gguf: Path, alone: Path) -> None:
    """Refuse a file whose head describes more weights than it has.

    The library would allocate that model before it compares one shape.

    Raises:
        ModelError: it is one.
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
    """Within the `with` statement a GGUF file is parsed once, and names of tensors are listed once.

    transformers parses all of the file three times (for the configuration, the weights and the
    tokenizer), value by value, and lists the names of all tensors anew for every module of the
    model. Nothing of what is kept is changed by who reads it.
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
    """The rows of a data set of the hub, from the local cache where they are there.

    Args:
        name: of its repository, or a folder.
        config: one of its configurations; empty for its own.
        split: the part of it.
        file: the one that is read; empty for all of the part.

    Raises:
        PlatformError: the package datasets is not installed.
        CalibrationError: there is no such data set, or it cannot be had here.
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
    """Turn what the library raises for a folder into one error that says what to do."""
    try:
        yield
    except (DeployError, MemoryError):
        raise
    # The library indexes and calls whatever the files say, so that they can make it raise anything.
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
    """What a JSON file names as code of its own; empty if there is none."""
    named = files.glanced(path).get("auto_map")
    return json.dumps(named) if named else ""

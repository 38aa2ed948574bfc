"""Read a model's tokenizer from its files, with no package but tokenizers.

The files are tokenizer.json, tokenizer_config.json, special_tokens_map.json, added_tokens.json and
the chat templates. The result is that of transformers' `AutoTokenizer` (`_from_pretrained` and
`TokenizersBackend` of transformers 5) in all cases in which `AutoTokenizer` takes tokenizer.json as
it is. Some of its classes, such as `LlamaTokenizer`, build the tokenizer anew instead. Those
tokenizers are written out as files of this kind when a model is copied; see
`pretrained.settle_tokenizer`.

Some entries of the files are for training and are not applied to a prompt: the truncation and the
padding of tokenizer.json, and `add_bos_token` and `add_eos_token` beside a tokenizer.json, whose
post-processor says which tokens are put around a text.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thanos_deploy.bundle.codec import loads

TOKENIZER = "tokenizer.json"
CONFIGURATION = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
TEMPLATE = "chat_template.jinja"
TEMPLATES = "additional_chat_templates"  # a folder of named templates

# Files of the tokenizer without the chat templates.
TOKENS = (TOKENIZER, CONFIGURATION, SPECIAL_TOKENS, ADDED_TOKENS)

# Named special tokens. Those that the vocabulary lacks get their ids in this order.
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))

# Entry with the special tokens that have no name, and the older name of the entry.
_EXTRA, _OLDER_EXTRA = "extra_special_tokens", "additional_special_tokens"


@dataclass(frozen=True, slots=True)
class Roles:
    """The special and added tokens in the configuration of a tokenizer.

    Attributes:
        named: maps a name such as `bos_token` to a text or to the arguments of an `AddedToken`.
        extra: special tokens without a name, each a text or the arguments of an `AddedToken`.
        added: arguments of the `AddedToken`s that the vocabulary must have, in the order of their
            ids.
        split: whether a special token within a text is tokenised like ordinary text.
    """

    named: Mapping[str, Any]
    extra: tuple[Any, ...]
    added: tuple[Mapping[str, Any], ...]
    split: bool


def files_in(folder: Path) -> list[str]:
    """Return the names of the tokenizer and chat template files that a model folder has."""
    return [
        *(name for name in (*TOKENS, TEMPLATE) if (folder / name).is_file()),
        *sorted(f"{TEMPLATES}/{path.name}" for path in (folder / TEMPLATES).glob("*.jinja")),
    ]


def is_template(file: str) -> bool:
    """Return whether a file, given by its name in the model folder, is a chat template."""
    return file == TEMPLATE or file.startswith(f"{TEMPLATES}/")


def load(folder: Path) -> Any:
    """Return the `tokenizers.Tokenizer` of a model folder.

    Raises:
        ImportError: the package tokenizers is not installed.
        Exception: the files are not readable, or their JSON has another form than expected; of
            any type, the package's own included.
    """
    import tokenizers

    content = (folder / TOKENIZER).read_text(encoding="utf-8")
    tokenizer = tokenizers.Tokenizer.from_str(content)
    roles = _roles(folder)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = roles.split
    known = tokenizer.get_added_tokens_decoder().values()
    same, spelled = {repr(token) for token in known}, {token.content for token in known}
    named = {_spelling(token) for token in roles.named.values()}
    missing = [
        token
        for token in (tokenizers.AddedToken(**rules) for rules in roles.added)
        if repr(token) not in same
    ]
    spelled |= {token.content for token in missing}
    # The library adds all entries with the same text in turn, and the last one counts.
    values: list[Any] = []
    for value in (*roles.named.values(), *roles.extra):
        if _spelling(value) not in spelled and value not in values:
            values.append(value)
    missing += [
        tokenizers.AddedToken(value, special=True)
        if isinstance(value, str)
        else tokenizers.AddedToken(**value)
        for value in values
    ]
    for token in missing:
        token.special = token.special or token.content in named
    tokenizer.add_tokens(missing)
    return tokenizer


def special_tokens(folder: Path) -> dict[str, str]:
    """Return the texts of a model folder's special tokens by names such as `bos_token`."""
    return {
        name: value if isinstance(value, str) else str(value["content"])
        for name, value in _roles(folder).named.items()
    }


def chat_template(folder: Path) -> str | None:
    """Return the default chat template of a model folder; None if there is none.

    Template files take precedence over templates in tokenizer_config.json.

    Raises:
        OSError, ValueError, TypeError, KeyError: the files are not readable.
    """
    files = {path.stem: path for path in sorted((folder / TEMPLATES).glob("*.jinja"))}
    if (folder / TEMPLATE).is_file():
        files.setdefault("default", folder / TEMPLATE)
    if files:
        return files["default"].read_text(encoding="utf-8") if "default" in files else None
    found = _read(folder / CONFIGURATION).get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    if isinstance(found, dict):
        found = found.get("default")
    if found is not None and not isinstance(found, str):
        raise TypeError(f"{CONFIGURATION}: chat_template is {found!r}")
    return found


def _roles(folder: Path) -> Roles:
    """Read the tokens that tokenizer.json and the files beside it name."""
    configuration = _read(folder / CONFIGURATION)
    content = _read(folder / TOKENIZER)
    if not configuration.get(_EXTRA) and _OLDER_EXTRA in configuration:
        configuration[_EXTRA] = configuration.pop(_OLDER_EXTRA)
    # For these names alone, special_tokens_map.json does not override the configuration.
    own = {
        name: configuration.pop(name)
        for name, value in list(configuration.items())
        if name.endswith("_token") and name not in _NAMED and isinstance(value, str)
    }
    if "added_tokens_decoder" in configuration:
        added = {int(id_): rules for id_, rules in configuration["added_tokens_decoder"].items()}
    else:
        # The older files are read only if the newer entry is missing.
        _merge(configuration, _read(folder / SPECIAL_TOKENS))
        added = dict(_old_added(folder, configuration))
        added |= {
            entry["id"]: {name: value for name, value in entry.items() if name != "id"}
            for entry in content.get("added_tokens", [])
        }
    if _OLDER_EXTRA in configuration:
        configuration.setdefault(_EXTRA, configuration[_OLDER_EXTRA])
    if padding := content.get("padding"):
        configuration.setdefault("pad_token", padding["pad_token"])
    rules = {token["content"]: token for token in added.values()}
    extra = configuration.get(_EXTRA) or ()
    named = {name: configuration.get(name) for name in _NAMED} | {
        name: value
        for name, value in configuration.items()
        if name.endswith("_token") and name not in _NAMED and isinstance(value, str | dict)
    }
    named |= own
    if isinstance(extra, dict):
        named, extra = named | extra, ()
    return Roles(
        named={
            name: _plain(rules.get(_spelling(value), value) if name in _NAMED else value)
            for name, value in named.items()
            if value is not None
        },
        extra=tuple(map(_plain, extra)),
        added=tuple(_plain(added[id_]) for id_ in sorted(added)),
        split=bool(configuration.get("split_special_tokens", False)),
    )


def _merge(configuration: dict[str, Any], older: Mapping[str, Any]) -> None:
    """Merge special_tokens_map.json into the configuration, whose entries it overrides."""
    for name, value in older.items():
        if name == _EXTRA and isinstance(value, list):
            known = list(configuration.get(name) or [])
            configuration[name] = [*known, *(token for token in value if token not in known)]
        elif isinstance(value, dict) and name != _EXTRA:
            configuration[name] = {**value, "special": True}
        else:
            configuration[name] = value


def _old_added(
    folder: Path, configuration: Mapping[str, Any]
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the id and the `AddedToken` arguments of each token in added_tokens.json."""
    special = {_spelling(configuration[name]) for name in _NAMED if configuration.get(name)}
    special |= {_spelling(token) for token in configuration.get(_EXTRA) or ()}
    for token, id_ in _read(folder / ADDED_TOKENS).items():
        its = token in special
        yield id_, {"content": token, "normalized": not its, "special": its}


def _spelling(token: Any) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _plain(token: Any) -> Any:
    """Remove the type mark that transformers writes into a serialised `AddedToken`."""
    if not isinstance(token, dict):
        return token
    return {name: value for name, value in token.items() if name != "__type"}


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is no such file."""
    content = loads(path.read_bytes()) if path.is_file() else {}
    if not isinstance(content, dict):
        raise TypeError(f"{path.name}: is not a JSON object")
    return content

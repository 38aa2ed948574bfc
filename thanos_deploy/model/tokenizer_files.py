"""A model's tokenizer, read from its files with the package tokenizers and nothing else.

`load` makes of tokenizer.json, tokenizer_config.json, special_tokens_map.json, added_tokens.json
and the chat templates what transformers' `AutoTokenizer` makes of them (`_from_pretrained` and
`TokenizersBackend` of transformers 5), where it takes tokenizer.json as it is. Classes that it
builds anew, such as `LlamaTokenizer`, are written out as files of this kind when a model is copied;
see `pretrained.settle_tokenizer`.

Some of what the files say is for training and is not applied to a prompt: where tokenizer.json cuts
and pads texts, and `add_bos_token` and `add_eos_token` beside a tokenizer.json, whose
post-processor says what is put around a text.
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
TEMPLATES = "additional_chat_templates"  # a folder of named ones

# All but the chat templates.
TOKENS = (TOKENIZER, CONFIGURATION, SPECIAL_TOKENS, ADDED_TOKENS)

# In the order in which those that the vocabulary lacks get their ids.
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))

# Special tokens without a name, and what that entry was called before.
_EXTRA, _OLDER_EXTRA = "extra_special_tokens", "additional_special_tokens"


@dataclass(frozen=True, slots=True)
class Roles:
    """What the configuration of a tokenizer says of tokens.

    Attributes:
        named: by a name such as `bos_token`, a text or the rules of an `AddedToken`.
        extra: special tokens without a name, likewise.
        added: tokens that the vocabulary is to have, in the order of their ids.
        split: special tokens within a text are text.
    """

    named: Mapping[str, Any]
    extra: tuple[Any, ...]
    added: tuple[Mapping[str, Any], ...]
    split: bool


def files_in(folder: Path) -> list[str]:
    """The files of a model folder that its tokenizer and chat template are read from."""
    return [
        *(name for name in (*TOKENS, TEMPLATE) if (folder / name).is_file()),
        *sorted(f"{TEMPLATES}/{path.name}" for path in (folder / TEMPLATES).glob("*.jinja")),
    ]


def is_template(file: str) -> bool:
    """Whether a file of a model folder, by its name in it, is a chat template."""
    return file == TEMPLATE or file.startswith(f"{TEMPLATES}/")


def load(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` of a model folder.

    Raises:
        ImportError: the package tokenizers is not installed.
        Exception: of the package, or for JSON of another form: the files are not readable.
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
    # Of one spelling the library adds every set of rules in turn, and the last one counts.
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
    """The special tokens of a model folder by their names, such as `bos_token`."""
    return {
        name: value if isinstance(value, str) else str(value["content"])
        for name, value in _roles(folder).named.items()
    }


def chat_template(folder: Path) -> str | None:
    """The template that a model folder has for conversations; None if it has none.

    Templates in files of their own count before those in tokenizer_config.json.

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
    """Read what the files beside tokenizer.json say of tokens, and what that says of its own."""
    configuration = _read(folder / CONFIGURATION)
    content = _read(folder / TOKENIZER)
    if not configuration.get(_EXTRA) and _OLDER_EXTRA in configuration:
        configuration[_EXTRA] = configuration.pop(_OLDER_EXTRA)
    # Of these names alone, special_tokens_map.json does not count before the configuration.
    own = {
        name: configuration.pop(name)
        for name, value in list(configuration.items())
        if name.endswith("_token") and name not in _NAMED and isinstance(value, str)
    }
    if "added_tokens_decoder" in configuration:
        added = {int(id_): rules for id_, rules in configuration["added_tokens_decoder"].items()}
    else:
        # The older files are looked at only where the newer entry is missing.
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
    """Take special_tokens_map.json over into the configuration; it counts before that."""
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
    """The tokens of added_tokens.json by their ids."""
    special = {_spelling(configuration[name]) for name in _NAMED if configuration.get(name)}
    special |= {_spelling(token) for token in configuration.get(_EXTRA) or ()}
    for token, id_ in _read(folder / ADDED_TOKENS).items():
        its = token in special
        yield id_, {"content": token, "normalized": not its, "special": its}


def _spelling(token: Any) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _plain(token: Any) -> Any:
    """Without the mark that transformers puts on an `AddedToken`."""
    if not isinstance(token, dict):
        return token
    return {name: value for name, value in token.items() if name != "__type"}


def _read(path: Path) -> dict[str, Any]:
    """A file of JSON, empty where there is none."""
    content = loads(path.read_bytes()) if path.is_file() else {}
    if not isinstance(content, dict):
        raise TypeError(f"{path.name}: is not a JSON object")
    return content

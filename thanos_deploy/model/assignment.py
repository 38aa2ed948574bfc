"""Which pattern each linear layer of a model gets.

A layer is selected by its full name, or by `re:` and a regular
expression that must match the whole
full name. A layer without a pattern stays dense: its weight is written exactly as it was.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import Any

from thanos_deploy.bundle.codec import loads
from thanos_deploy.errors import InputError, PatternError, UsageError
from thanos_deploy.pattern import SPELLINGS, Pattern, Unstructured, parse

DENSE = "dense"

_EXPRESSION = "re:"
_NEAREST = 3


@dataclass(frozen=True, slots=True)
class SparsityFile:
    """What a file says of some layers.

    Attributes:
        name: of the file.
        sha256: of its bytes.
        patterns: a layer's name or `re:` and an expression -> what it is to hold, None for dense.
    """

    name: str
    sha256: str
    patterns: Mapping[str, Pattern | None]


def read_file(path: Path) -> SparsityFile:
    """Read a JSON object of layers and patterns, such as {"re:.*down_proj": "dense"}.

    Raises:
        InputError: the file is missing or no such object; the message says where.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror})", fix="check the path"
        ) from error
    try:
        pairs = loads(content, object_pairs_hook=list)
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})", fix=_EXAMPLE) from error
    # An object is a list of pairs here, so that a name that comes twice is seen.
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise InputError(f"{path}: not a JSON object", fix=_EXAMPLE)
    if not pairs:
        raise InputError(f"{path}: names no layer", fix=_EXAMPLE)
    patterns: dict[str, Pattern | None] = {}
    for selector, spelling in pairs:
        if selector in patterns:
            raise InputError(f"{path}: {selector!r} appears twice", fix="leave one of them out")
        patterns[selector] = _read_pattern(f"{path}: {selector!r}", spelling)
    return SparsityFile(path.name, sha256(content).hexdigest(), patterns)


_EXAMPLE = 'write one JSON object, such as {"re:.*\\\\.down_proj": "dense"}'


def _read_pattern(where: str, spelling: Any) -> Pattern | None:
    if spelling == DENSE:
        return None
    try:
        return parse(spelling if isinstance(spelling, str) else json.dumps(spelling))
    except PatternError as error:
        raise InputError(
            f"{where}: {error.message}", fix=f"write {DENSE}, or {SPELLINGS}"
        ) from error


def assign(
    names: Sequence[str],
    pattern: Pattern,
    *,
    include: Sequence[str] = (),
    ignore: Sequence[str] = (),
    file: SparsityFile | None = None,
) -> dict[str, Pattern]:
    """The pattern of every layer that is to be pruned.

    Args:
        names: of all linear layers.
        pattern: of a layer that the file does not name.
        include: the layers that may be pruned; empty for all.
        ignore: layers that stay dense.
        file: layers with patterns of their own.

    Returns:
        full name -> pattern, in the order of `names`.

    Raises:
        UsageError: a name or an expression calls no layer, a layer is told two things, or no
            layer is left.
    """
    included = _union("--include", include, names) if include else set(names)
    ignored = _union("--ignore", ignore, names)
    own: dict[str, tuple[str, Pattern | None]] = {}
    for selector, its in file.patterns.items() if file else ():
        assert file is not None
        for name in _called(f"{file.name}: {selector}", selector, names):
            before, earlier = own.get(name, (selector, its))
            if earlier != its:
                raise UsageError(
                    f"{file.name}: the entry {before!r} makes {name} {earlier or DENSE}, "
                    f"and the entry {selector!r} makes it {its or DENSE}",
                    fix="name the layer in one entry only, or give both entries the same pattern",
                )
            if its is not None and (name in ignored or name not in included):
                option = "--ignore names it" if name in ignored else "--include does not"
                raise UsageError(
                    f"{file.name}: the entry {selector!r} makes {name} {its}, but {option}",
                    fix="name the layer in the file or in the option, not in both",
                )
            own[name] = (selector, its)
    assigned = {
        name: its
        for name in names
        if name in included and name not in ignored
        if (its := own[name][1] if name in own else pattern) is not None
    }
    if not assigned:
        raise UsageError(
            f"all {len(names)} linear layers are left out, so there is nothing to prune",
            fix="leave fewer layers out with --include, --ignore and the sparsity file",
        )
    return assigned


def every(
    names: Iterable[str], patterns: Pattern | Mapping[str, Pattern] | None
) -> dict[str, Pattern]:
    """One pattern for all layers, or none, as each layer's own."""
    if isinstance(patterns, Mapping):
        return {name: patterns[name] for name in names if name in patterns}
    return {} if patterns is None else dict.fromkeys(names, patterns)


def counts(patterns: Iterable[Pattern | None]) -> dict[str, int]:
    """How many layers have which pattern; unstructured ones of many fractions are a range."""
    of_layers = list(patterns)
    fractions = {its.sparsity for its in of_layers if isinstance(its, Unstructured)}
    span = f"unstructured:{min(fractions):.4f} to {max(fractions):.4f}" if fractions else ""
    return dict(
        Counter(
            span if isinstance(its, Unstructured) and len(fractions) > 1 else str(its or DENSE)
            for its in of_layers
        )
    )


def describe(patterns: Mapping[str, Pattern], layers: int) -> str | None:
    """What the layers hold, in words; None where that is nothing.

    Args:
        patterns: of the layers that are not dense.
        layers: how many there are in all.
    """
    found = counts([*patterns.values(), *[None] * (layers - len(patterns))])
    if not patterns:
        return None
    if len(found) == 1:
        return next(iter(found))
    return ", ".join(f"{its} in {count} layers" for its, count in found.items())


def _union(option: str, selectors: Sequence[str], names: Sequence[str]) -> set[str]:
    return {
        name for selector in selectors for name in _called(f"{option} {selector}", selector, names)
    }


def _called(where: str, selector: str, names: Sequence[str]) -> list[str]:
    """The layers that a selector calls.

    Raises:
        UsageError: there is none, or the expression is none.
    """
    expression = selector.removeprefix(_EXPRESSION)
    if selector.startswith(_EXPRESSION):
        try:
            called = [name for name in names if re.fullmatch(expression, name)]
        except re.error as error:
            raise UsageError(
                f"{where}: not a regular expression ({error})",
                fix="correct the expression, with a backslash before special characters that "
                "are meant literally",
            ) from error
    else:
        called = [name for name in names if name == selector]
    if not called:
        nearest = get_close_matches(expression, names, n=_NEAREST, cutoff=0.0)
        raise UsageError(
            f"{where}: no linear layer of the model has this name; the most similar are "
            f"{', '.join(nearest)}",
            fix="give a full name, or re: and a regular expression that matches the full "
            "name, such as re:.*down_proj; embeddings and the output head are never pruned",
        )
    return called

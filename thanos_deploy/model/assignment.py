"""Assign a sparsity pattern to each linear layer of a model.

A selector is the full name of a layer, or `re:` and a regular expression that must match the whole
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
    """The content of a file that gives some layers their own patterns.

    Attributes:
        name: name of the file.
        sha256: SHA-256 of its bytes.
        patterns: maps a selector to the pattern of the layers that it matches; None for dense.
    """

    name: str
    sha256: str
    patterns: Mapping[str, Pattern | None]


def read_file(path: Path) -> SparsityFile:
    """Read a JSON object of layers and patterns, such as {"re:.*down_proj": "dense"}.

    Raises:
        InputError: the file is missing or does not hold such an object; the message says where.
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
    # JSON objects are read as lists of pairs, so that a repeated name is noticed.
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
    """Return the pattern of every layer that is to be pruned.

    Args:
        names: full names of all linear layers.
        pattern: pattern of the layers that the file does not select.
        include: selectors of the layers that may be pruned; empty for all.
        ignore: selectors of layers that stay dense.
        file: layers with patterns of their own.

    Returns:
        maps the full name of a layer to its pattern, in the order of `names`.

    Raises:
        UsageError: a selector matches no layer or is not a valid expression, a layer is given two
            different instructions, or no layer is left to prune.
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
                option = "--ignore names it" if name in ignored else "--include does not name it"
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
    """Map each layer to its pattern, from one pattern for all of them, a mapping, or None."""
    if isinstance(patterns, Mapping):
        return {name: patterns[name] for name in names if name in patterns}
    return {} if patterns is None else dict.fromkeys(names, patterns)


def counts(patterns: Iterable[Pattern | None]) -> dict[str, int]:
    """Count the layers by pattern; different unstructured fractions count together as one range."""
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
    """Describe the patterns of the layers in words; None if every layer is dense.

    Args:
        patterns: maps each layer that is not dense to its pattern.
        layers: number of all linear layers.
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
    """Return the names of the layers that a selector matches.

    Raises:
        UsageError: it matches no layer, or the regular expression is invalid.
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

"""The form that an answer has to have: JSON of a schema, a regular expression, a grammar.

llguidance computes which tokens may come next. A form comes from whoever sends a request, so its
size and what it may cost, when it is compiled and at every token, are limited.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.text import Tokenizer
from thanos_deploy.errors import InputError, PlatformError, UsageError

# Characters of a grammar: the largest take some two seconds to compile.
_CHARACTERS = 64 << 10

# Compiled grammars that are kept: clients send the same few again and again.
_KEPT = 32

# In llguidance's terms; a step within them takes some milliseconds.
_LIMITS = {
    "initial_lexer_fuel": 500_000,
    "max_grammar_size": 50_000,
    "max_items_in_row": 10_000,
    "max_lexer_states": 50_000,
    "step_lexer_fuel": 100_000,
    "verbose_errors": False,
}

# Like `json.dumps`: a model that is left to choose may write blanks without end.
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


# Keywords of JSON Schema below which there are schemas, and those that say more of an object.
_SCHEMAS_BY_NAME = frozenset({"properties", "$defs", "definitions"})
_SCHEMAS = frozenset({"anyOf", "oneOf", "prefixItems"})
_SAY_MORE = frozenset(
    {
        *("additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames"),
        *("allOf", "anyOf", "oneOf", "not", "if", "$ref", "dependentSchemas"),
    }
)


class Grammars:
    """Compiles grammars for one tokenizer; from any thread."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        """Prepare.

        Args:
            tokenizer: of the model.
            vocabulary: how many ids the model's logits have.

        Raises:
            PlatformError: llguidance is not installed.
            InputError: llguidance does not take the tokenizer, or no token ends a text.
        """
        library = _library()
        if not tokenizer.stop:
            raise InputError(
                "the model has no end-of-text token, which structured answers need",
                fix="give the model's generation_config.json an eos_token_id",
            )
        try:
            self._tokenizer = library.LLTokenizer(
                tokenizer.serialized(),
                n_vocab=max(vocabulary, tokenizer.size),
                eos_token=sorted(tokenizer.stop),
            )
        except ValueError as error:
            raise InputError(
                f"the tokenizer cannot be used for structured answers ({error})",
                fix="leave response_format, tools and the guided fields out of the request",
            ) from error
        self._library = library
        self._vocabulary = vocabulary
        self._limits = library.LLParserLimits(**_LIMITS)
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Any] = OrderedDict()

    def compile(self, grammar: str) -> "Grammar":
        """Compile a grammar, which takes up to seconds.

        Args:
            grammar: in llguidance's variant of Lark, such as the functions of this module make.

        Raises:
            UsageError: it is none, or it is too large or too complex.
        """
        if len(grammar) > _CHARACTERS:
            raise _refused(
                f"{len(grammar)} characters are more than the {_CHARACTERS} that are allowed"
            )
        with self._lock:
            matcher = self._kept.get(grammar)
            if matcher is None:
                with _guarded():
                    matcher = self._library.LLMatcher(
                        self._tokenizer, grammar, log_level=0, limits=self._limits
                    )
                    if not matcher.is_error():
                        first = matcher.deep_copy()
                        first.compute_bitmask()  # some are found out by the first token only
                        matcher = first if first.is_error() else matcher
                if matcher.is_error():
                    raise _refused(matcher.get_error())
                self._kept[grammar] = matcher
            self._kept.move_to_end(grammar)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return Grammar(matcher, self._vocabulary)


class Grammar:
    """A compiled grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def begin(self) -> "Match":
        """A text of this form, of which there is nothing yet."""
        return Match(self._matcher.deep_copy(), self._vocabulary)


class Match:
    """See `runtime.batching.Constraint`."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def allowed(self) -> NDArray[np.bool_]:
        """See `Constraint.allowed`.

        Raises:
            UsageError: to go on would be too complex.
        """
        with _guarded():
            mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise _refused(self._matcher.get_error())
        bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
        allowed: NDArray[np.bool_] = bits[: self._vocabulary].astype(bool)
        return allowed

    def take(self, token: int) -> None:
        """See `Constraint.take`."""
        with _guarded():
            taken = self._matcher.consume_token(token)
        if not taken:
            raise _refused(self._matcher.get_error())


def of_schema(schema: Mapping[str, Any]) -> str:
    """The grammar of JSON that a schema describes; see `closed`."""
    grammar: str = _library().LLMatcher.grammar_from_json_schema(
        json.dumps(closed(schema)), overrides=_JSON
    )
    return grammar


def of_regex(regex: str) -> str:
    """The grammar of texts that a regular expression matches as a whole."""
    grammar: str = _library().LLMatcher.grammar_from_regex(regex)
    return grammar


def of_choice(texts: Sequence[str]) -> str:
    """The grammar of one of some texts."""
    return "start: " + " | ".join(map(json.dumps, texts))


def of_grammar(text: str) -> str:
    """The grammar that is written in llama.cpp's GBNF, or in llguidance's variant of Lark.

    Raises:
        UsageError: it is neither.
    """
    _library()
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        grammar: str = any_to_lark(text)
    except Exception as error:  # of whatever kind its parser stumbles with
        raise _refused(str(error)) from error
    return grammar


def json_within(schema: Mapping[str, Any]) -> str:
    """The part of a grammar that is JSON of a schema; see `closed`."""
    return "%json " + json.dumps({**closed(schema), "x-guidance": _JSON})


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema whose objects have the properties that it names, and no others.

    To JSON Schema any others are welcome where nothing is said of them, and a model that may invent
    some does not come to an end. Where the schema says something of them, that holds.
    """
    inner = {
        key: {name: _closed(part) for name, part in value.items()}
        if key in _SCHEMAS_BY_NAME and isinstance(value, Mapping)
        else [_closed(part) for part in value]
        if key in _SCHEMAS and isinstance(value, list)
        else _closed(value)
        if key == "items"
        else value
        for key, value in schema.items()
    }
    if "properties" in inner and not _SAY_MORE & inner.keys():
        inner["additionalProperties"] = False
    return inner


def _closed(part: Any) -> Any:
    return closed(part) if isinstance(part, Mapping) else part


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise PlatformError(
            "structured answers need the package llguidance, which is not installed",
            fix="pip install 'thanos-deploy[structured]'",
        ) from error
    return llguidance


@contextmanager
def _guarded() -> Iterator[None]:
    """Whatever the library stumbles with, a panic of its Rust part included, is the form's fault.

    Raises:
        UsageError: it stumbled.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # as a panic is: it must end neither a thread nor the server
        raise _refused(f"{type(error).__name__}: {error}") from error


def _refused(problem: str) -> UsageError:
    first = problem.strip().splitlines()[0] if problem.strip() else "it cannot be compiled"
    return UsageError(
        f"the requested form of the answer is not supported: {first}",
        fix="send a valid schema, regular expression or grammar, or a smaller one",
    )

"""Structured answers: JSON that follows a schema, a regular expression, or a grammar.

llguidance computes which tokens may come next. The client sends the form of the answer, so its
size is limited, and so is its cost, both when it is compiled and at every token.
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

# Longest grammar, in characters; the longest take some two seconds to compile.
_CHARACTERS = 64 << 10

# Number of compiled grammars to cache: clients send the same few again and again.
_KEPT = 32

# Limits of llguidance's parser; a step within them takes some milliseconds.
_LIMITS = {
    "initial_lexer_fuel": 500_000,
    "max_grammar_size": 50_000,
    "max_items_in_row": 10_000,
    "max_lexer_states": 50_000,
    "step_lexer_fuel": 100_000,
    "verbose_errors": False,
}

# White space as `json.dumps` writes it: if it were free, a model might write blanks without end.
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


# Keywords of JSON Schema that contain schemas, and keywords with further rules for an object.
_SCHEMAS_BY_NAME = frozenset({"properties", "$defs", "definitions"})
_SCHEMAS = frozenset({"anyOf", "oneOf", "prefixItems"})
_SAY_MORE = frozenset(
    {
        *("additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames"),
        *("allOf", "anyOf", "oneOf", "not", "if", "$ref", "dependentSchemas"),
    }
)


class Grammars:
    """Compiles grammars for one tokenizer, and caches them; thread-safe."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        """Hand the tokenizer to llguidance.

        Args:
            tokenizer: the model's tokenizer.
            vocabulary: number of ids that the model's logits have.

        Raises:
            PlatformError: llguidance is not installed.
            InputError: llguidance does not accept the tokenizer, or the model has no end-of-text
                token.
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
        """Compile a grammar, which can take seconds.

        Args:
            grammar: a grammar as the functions of this module return it, such as one in
                llguidance's variant of Lark.

        Raises:
            UsageError: the grammar is not valid, too large, or too complex.
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
                        first.compute_bitmask()  # some errors show only at the first token
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
        """Return the state of the grammar at the beginning of a text."""
        return Match(self._matcher.deep_copy(), self._vocabulary)


class Match:
    """The state of a grammar within one text; see `runtime.batching.Constraint`."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def allowed(self) -> NDArray[np.bool_]:
        """See `Constraint.allowed`.

        Raises:
            UsageError: the next token is too complex to compute.
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
    """Return a grammar of the JSON that a schema describes; see `closed`."""
    grammar: str = _library().LLMatcher.grammar_from_json_schema(
        json.dumps(closed(schema)), overrides=_JSON
    )
    return grammar


def of_regex(regex: str) -> str:
    """Return a grammar of the texts that a regular expression matches as a whole."""
    grammar: str = _library().LLMatcher.grammar_from_regex(regex)
    return grammar


def of_choice(texts: Sequence[str]) -> str:
    """Return a grammar that allows any one of the texts."""
    return "start: " + " | ".join(map(json.dumps, texts))


def of_grammar(text: str) -> str:
    """Convert a grammar in llama.cpp's GBNF, or in llguidance's variant of Lark.

    Raises:
        UsageError: the text is neither.
    """
    _library()
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        grammar: str = any_to_lark(text)
    except Exception as error:  # the parser raises exceptions of any type
        raise _refused(str(error)) from error
    return grammar


def json_within(schema: Mapping[str, Any]) -> str:
    """Return the part of a Lark grammar for the JSON that a schema describes; see `closed`."""
    return "%json " + json.dumps({**closed(schema), "x-guidance": _JSON})


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema whose objects may have only the properties that the schema names.

    JSON Schema allows further properties by default, and a model that may invent properties does
    not come to an end. Where the schema itself has rules for further properties, they are kept.
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
    """Turn every exception of the library, panics of its Rust code included, into a UsageError.

    Raises:
        UsageError: the library raised an exception; the form of the answer is to blame.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # such as a panic: it must end neither a thread nor the server
        raise _refused(f"{type(error).__name__}: {error}") from error


def _refused(problem: str) -> UsageError:
    first = problem.strip().splitlines()[0] if problem.strip() else "it cannot be compiled"
    return UsageError(
        f"the requested form of the answer is not supported: {first}",
        fix="send a valid schema, regular expression or grammar, or a smaller one",
    )

"""Rotary embeddings whose frequencies depend on the longest row of a batch.

longrope takes one set of factors for short texts and another one for long texts, and dynamic NTK
scaling grows with a text that is longer than the model was trained on. transformers computes both
once for a batch, from the largest position in it, and so does a graph that was traced from it. So
beyond the point where that begins, a row would change with the texts that it shares a batch with.
Up to that point it does not. Other kinds (linear, yarn, llama3) are the same for every length.
Source: `dynamic_rope_update` in transformers' modeling_rope_utils.py.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thanos_deploy.bundle.codec import loads
from thanos_deploy.errors import InputError

_LONGROPE, _DYNAMIC = "longrope", "dynamic"


@dataclass(frozen=True, slots=True)
class Change:
    """Where the frequencies begin to depend on the longest row.

    Attributes:
        kind: of rotary embedding.
        tokens: the longest row that they do not depend on.
    """

    kind: str
    tokens: int

    def require_alike(self, lengths: NDArray[np.int64]) -> None:
        """Refuse rows of which one decides on the frequencies of others.

        Args:
            lengths: int64[rows], tokens of each.

        Raises:
            InputError: they differ in length, and the longest is beyond the change.
        """
        longest = int(lengths.max())
        if longest > self.tokens and int(lengths.min()) < longest:
            raise InputError(
                f"a batch of rows of {int(lengths.min())} to {longest} tokens: {self._reason}",
                fix=f"run the rows one by one, or keep all of them below {self.tokens + 1} tokens",
            )

    def require_never(self, max_sequence: int, bundle: Path) -> None:
        """Refuse a graph that texts of any length are to share.

        Args:
            max_sequence: the most tokens of a row that the graph is made for.
            bundle: its folder, for the message.

        Raises:
            InputError: rows may be longer than the change.
        """
        if max_sequence > self.tokens:
            raise InputError(
                f"{bundle}: its graph takes up to {max_sequence} tokens, and at that "
                "length the texts in a batch would change each other's answers: "
                f"{self._reason}",
                fix=f"run `thanos-deploy export {bundle} --target onnx --max-seq {self.tokens} "
                "--overwrite` first; `generate` answers longer texts, one at a time",
            )

    @property
    def _reason(self) -> str:
        return (
            f"the model's rotary embedding ({self.kind}) depends on the longest text in a "
            f"batch as soon as that text has more than {self.tokens} tokens"
        )


def change_of(configuration: Mapping[str, Any]) -> Change | None:
    """Where the frequencies of a model begin to depend on the longest row; None if nowhere.

    Args:
        configuration: the content of its config.json.
    """
    return min(_changes(configuration), key=lambda change: change.tokens, default=None)


def change_in(bundle: Path) -> Change | None:
    """The same for the model of a bundle.

    None for a bundle without a model: that is a dense model's in the cache, which is measured on
    rows of one length only.

    Raises:
        InputError: its config.json is missing or not readable.
    """
    if not (bundle / "model").is_dir():
        return None
    path = bundle / "model" / "config.json"
    try:
        return change_of(loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not a readable model configuration ({type(error).__name__}: {error})",
            fix="restore it from a copy of the bundle, or make the bundle again",
        ) from error


def depends_on_length(rope: Mapping[str, Any]) -> bool:
    """Whether `rope_parameters` has a kind whose frequencies depend on the longest row."""
    kinds = [_kind(its) for its in _parts(rope)]
    return any(kind == _LONGROPE or _DYNAMIC in kind for kind in kinds)


def _parts(rope: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The entry, or its parts where each type of layer has one."""
    return [its for its in rope.values() if isinstance(its, dict)] or [rope]


def _kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _changes(configuration: Mapping[str, Any]) -> Iterator[Change]:
    # The second is the older name of the entry.
    rope = configuration.get("rope_parameters") or configuration.get("rope_scaling") or {}
    trained = configuration.get("original_max_position_embeddings")
    for its in _parts(rope):
        kind = _kind(its)
        if kind == _LONGROPE:
            tokens = trained or its.get("original_max_position_embeddings")
            yield Change(kind, int(tokens or configuration["max_position_embeddings"]))
        elif _DYNAMIC in kind:
            yield Change(kind, int(configuration["max_position_embeddings"]))

"""Rotary embeddings whose frequencies depend on the longest row of a batch.

longrope uses one set of factors for short texts and another one for long texts. Dynamic NTK scaling
grows with the length of a text that is longer than the model was trained on. transformers computes
both once for a batch, from the largest position in it, and so does a graph that was traced from
transformers. So in a batch with a row longer than a limit, the result of a row depends on the other
rows. Up to the limit it does not. Other kinds (linear, yarn, llama3) are the same for every length.

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
    """The length above which the frequencies depend on the longest row of a batch.

    Attributes:
        kind: kind of rotary embedding.
        tokens: the longest row, in tokens, for which the frequencies are always the same.
    """

    kind: str
    tokens: int

    def require_alike(self, lengths: NDArray[np.int64]) -> None:
        """Refuse a batch in which one row would change the frequencies of another.

        Args:
            lengths: int64[rows], the tokens of each row.

        Raises:
            InputError: the rows differ in length, and the longest has more than `tokens` tokens.
        """
        longest = int(lengths.max())
        if longest > self.tokens and int(lengths.min()) < longest:
            raise InputError(
                f"a batch of rows of {int(lengths.min())} to {longest} tokens: {self._reason}",
                fix=f"run the rows one by one, or keep all of them below {self.tokens + 1} tokens",
            )

    def require_never(self, max_sequence: int, bundle: Path) -> None:
        """Refuse a graph for batches of rows of different lengths if the rows may be too long.

        Args:
            max_sequence: most tokens of a row that the graph takes.
            bundle: folder of the graph's bundle, for the error message.

        Raises:
            InputError: rows may have more than `tokens` tokens.
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
    """Find the length above which a model's frequencies depend on the longest row.

    Args:
        configuration: content of the model's config.json.

    Returns:
        None if the frequencies never depend on the longest row.
    """
    return min(_changes(configuration), key=lambda change: change.tokens, default=None)


def change_in(bundle: Path) -> Change | None:
    """Do what `change_of` does for the model of a bundle.

    Returns:
        None also for a bundle without a model, which is the bundle of a dense model in the cache.
        Such a bundle is only measured on rows of one length.

    Raises:
        InputError: the config.json of the model is missing or not readable.
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
    """Return whether `rope_parameters` has a kind whose frequencies depend on the longest row."""
    kinds = [_kind(its) for its in _parts(rope)]
    return any(kind == _LONGROPE or _DYNAMIC in kind for kind in kinds)


def _parts(rope: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Split an entry that has a part for each type of layer; any other entry is the only part."""
    return [its for its in rope.values() if isinstance(its, dict)] or [rope]


def _kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _changes(configuration: Mapping[str, Any]) -> Iterator[Change]:
    # `rope_scaling` is the older name of the entry.
    rope = configuration.get("rope_parameters") or configuration.get("rope_scaling") or {}
    trained = configuration.get("original_max_position_embeddings")
    for its in _parts(rope):
        kind = _kind(its)
        if kind == _LONGROPE:
            tokens = trained or its.get("original_max_position_embeddings")
            yield Change(kind, int(tokens or configuration["max_position_embeddings"]))
        elif _DYNAMIC in kind:
            yield Change(kind, int(configuration["max_position_embeddings"]))

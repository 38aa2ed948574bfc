"""A text cut into segments of token ids."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from thanos_deploy.calibration.frame import frame_of
from thanos_deploy.calibration.texts import Text
from thanos_deploy.errors import CalibrationError, ModelError, boundary


def segments(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    length: int,
    seed: int | None,
    by_row: bool = False,
    further: int = 0,
) -> Tensor:
    """Cut a text into segments of equal length, without overlap.

    Each segment begins with the tokenizer's special tokens; see `frame`.

    Args:
        text: the text; tokenized as a whole, or by rows if `by_row` is set.
        tokenizer: the model's tokenizer.
        count: number of segments to take.
        length: tokens in each segment, including the special tokens in front.
        seed: seed for choosing segments from the whole text; None takes the first ones.
        by_row: whether each segment is the beginning of a row that is long enough.
        further: number of additional segments to take; fewer if the text has fewer.

    Returns:
        int64[count + further, length], or fewer rows if the text has fewer further segments. The
        first `count` segments are in the order of the text and do not depend on `further`; the
        further ones follow, again in the order of the text.

    Raises:
        CalibrationError: the text has too few segments, or a segment would have no token of the
            text.
    """
    every = every_segment(text, tokenizer, length=length, by_row=by_row)
    if len(every) < count and by_row:
        raise CalibrationError(
            f"{text.origin}: {len(every)} of {len(text.rows)} rows have at least the "
            f"{length} tokens of a segment, and {count} such rows are needed",
            fix="give longer rows, fewer or shorter segments, or join the rows with --calib-cut "
            "packed",
        )
    if len(every) < count:
        own = length - len(frame_of(tokenizer))
        raise CalibrationError(
            f"{text.origin}: {len(_tokens(text, tokenizer))} tokens found, and "
            f"{count * own} needed for {count} segments of {length} tokens",
            fix="give a longer text, or fewer or shorter segments",
        )
    order = torch.arange(len(every))
    if seed is not None:
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
    parts = order[:count], order[count : count + further]
    return torch.cat([every[part.sort().values] for part in parts])


def every_segment(
    text: Text, tokenizer: PreTrainedTokenizerBase, *, length: int, by_row: bool = False
) -> Tensor:
    """Return all segments of a text, from which `segments` chooses; int64[available, length].

    Raises:
        CalibrationError: a segment would have no token of the text.
    """
    frame = frame_of(tokenizer)
    if length <= len(frame):
        raise CalibrationError(
            f"segments of {length} tokens are too short: each begins with {len(frame)} of "
            "the tokenizer's special tokens",
            fix="use longer segments",
        )
    own = length - len(frame)
    if not by_row:
        return frame.before(_cut(_tokens(text, tokenizer), own))
    rows = [_tokens(Text(text.origin, row), tokenizer)[:own] for row in text.rows]
    long = [row for row in rows if len(row) == own]
    return frame.before(torch.stack(long) if long else torch.empty(0, own, dtype=torch.int64))


def _tokens(text: Text, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    with boundary(
        ModelError,
        f"{tokenizer.name_or_path}: the tokenizer cannot encode {text.origin}",
        fix="restore the model's tokenizer from its origin, or give another text",
    ):
        return _encoded(text, tokenizer)


def _encoded(text: Text, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    # verbose=False: no warning that the whole text is longer than the model's context.
    ids = tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _cut(ids: Tensor, length: int) -> Tensor:
    available = len(ids) // length
    return ids[: available * length].reshape(available, length)

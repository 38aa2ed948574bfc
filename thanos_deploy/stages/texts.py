"""Read the texts that a request names, and cut them into segments for a model.

A model is not judged on the text that it was calibrated on; see `require_other_text`.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from runtime.server.rendering import Rendering
from runtime.server.templates import ChatTemplate, Conversation
from thanos_deploy.calibration import segments
from thanos_deploy.calibration.data import Data
from thanos_deploy.calibration.frame import Frame, frame_of
from thanos_deploy.calibration.mixture import Part, parse, shares
from thanos_deploy.calibration.rows import Template
from thanos_deploy.calibration.texts import BUILTIN, Text, builtin_text, read_text, texts_of
from thanos_deploy.errors import CalibrationError, ModelError, UsageError, boundary
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.load import load_tokenizer
from thanos_deploy.model.pretrained import load_rows

logger = logging.getLogger(__name__)


def open_texts(
    name: str, text_field: str, *, held_out: bool, source: Checkpoint | None
) -> list[tuple[Part, Text]]:
    """Read the texts that a name describes, each with its share of the mixture; see `mixture`.

    Args:
        name: "builtin", a path, a data set, or several of these with weights.
        text_field: see `texts.read_text`.
        held_out: for the built-in text and for data sets with a short name, take the part for
            evaluation instead of the part for calibration.
        source: the model whose chat template turns conversations into text; None to refuse
            conversations.

    Raises:
        CalibrationError, PlatformError, UsageError: see `texts.read_text`, `pretrained.load_rows`
            and `mixture.parse`.
    """

    def opened(part: Part, template: Template | None) -> Text:
        if part.name == BUILTIN:
            return builtin_text(held_out=held_out)
        if part.data_set is None:
            path = Path(part.name).expanduser()
            return read_text(path, text_field=text_field, template=template)
        its = part.data_set
        rows = load_rows(its.name, its.config, its.split, its.files)
        found = ((f"{its}, row {number}", row) for number, row in enumerate(rows, start=1))
        return Text.of_rows(str(its), texts_of(found, text_field, template))

    with _template(source) as template:
        return [(part, opened(part, template)) for part in parse(name, held_out=held_out)]


@contextmanager
def _template(source: Checkpoint | None) -> Iterator[Template | None]:
    """Yield the function that renders a conversation; None if the model has no chat template.

    A chat template is a program that comes with the model, so it runs in a separate process with a
    limit of time and memory for each conversation.
    """
    tokenizer = None if source is None else load_tokenizer(source.folder)
    if source is None or tokenizer is None or not tokenizer.chat_template:
        yield None
        return
    with ExitStack() as stack:

        @cache  # started at the first conversation; most texts have none
        def rendering() -> Rendering:
            with boundary(
                ModelError,
                f"{source.folder}: its chat template is not readable",
                fix="correct the template, or restore it from the model's origin",
            ):
                named = tokenizer.special_tokens_map.items()
                tokens = {name: token for name, token in named if isinstance(token, str)}
                made = Rendering(ChatTemplate(tokenizer.get_chat_template(), tokens))
            stack.callback(made.close)
            return made

        def write(messages: Sequence[Mapping[str, str]]) -> str:
            try:
                return rendering().render(Conversation(messages, begin=False))
            except UsageError as error:
                roles = ", ".join(message["role"] for message in messages)
                raise CalibrationError(
                    f"{source.folder}: its chat template does not accept a conversation "
                    f"with the roles {roles} ({error.message})",
                    fix="remove or correct such rows",
                ) from error

        yield write


def open_text(
    name: str, text_field: str, *, held_out: bool, source: Checkpoint | None = None
) -> Text:
    """Read all texts that a name describes, joined into one; see `open_texts`."""
    return joined(
        [text for _, text in open_texts(name, text_field, held_out=held_out, source=source)]
    )


def joined(texts: Sequence[Text]) -> Text:
    """Join several texts into one."""
    if len(texts) == 1:
        return texts[0]
    return Text(
        " + ".join(text.origin for text in texts),
        "\n\n".join(text.content for text in texts),
        tuple(row for text in texts for row in text.rows),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """The calibration data of a model.

    Attributes:
        text: the whole calibration text.
        ids: int64[count, length], the segments from which statistics are collected.
        further: int64[count, length], further segments, used only to tune blocks.
        frame: the special tokens that each segment begins with.
    """

    text: Text
    ids: Tensor
    further: Tensor
    frame: Frame


def calibration(source: Checkpoint, data: Data, further: int = 0) -> Calibration:
    """Read the calibration text of a model and cut it into segments.

    Args:
        source: the model.
        data: which text to take, and how much of it.
        further: number of further segments, used only to tune blocks; fewer are returned if the
            text is too short.

    Raises:
        CalibrationError, UsageError: see `open_texts` and `segments_for`.
    """
    found = open_texts(data.calib, data.text_field, held_out=False, source=source)
    texts = [
        text if data.calib_rows is None else text.sample(data.calib_rows, data.seed)
        for _, text in found
    ]
    weights = [part.weight for part, _ in found]
    cut = [
        segments_for(
            source,
            text,
            count,
            data.seqlen,
            seed=data.seed,
            by_row=data.calib_cut == "row",
            further=more,
        )
        for text, count, more in zip(
            texts, shares(weights, data.nsamples), shares(weights, further), strict=True
        )
        if count or len(texts) == 1
    ]
    first, rest = (torch.cat(parts) for parts in zip(*((a, b) for a, b, _ in cut), strict=True))
    if len(rest) < further:
        logger.info(
            "the calibration text has %d segments for tuning, and %d were asked for",
            len(first) + len(rest),
            len(first) + further,
        )
    return Calibration(joined(texts), first, rest, cut[0][2])


def require_other_text(text: Text, calibration_sha256: str | None) -> None:
    """Refuse to judge a model on the text that it was calibrated on.

    Raises:
        UsageError: the hash of `text` is that of the calibration text.
    """
    if text.sha256 == calibration_sha256:
        raise UsageError(
            f"{text.origin}: the model was calibrated on this text, so its perplexity on "
            "this text says nothing about its quality",
            fix="give another text with --eval-text",
        )


def segments_for(
    source: Checkpoint,
    text: Text,
    count: int,
    length: int,
    *,
    seed: int | None,
    by_row: bool = False,
    further: int = 0,
) -> tuple[Tensor, Tensor, Frame]:
    """Cut a text into segments for a model; see `segments.segments`.

    Returns:
        the segments, int64[count, length]; the further segments, int64[at most `further`, length];
        and the special tokens that each segment begins with.

    Raises:
        CalibrationError: the text is too short.
        ModelError: the text has tokens for which the model has no embedding.
        UsageError: the model does not take segments of this length.
    """
    tokenizer = load_tokenizer(source.folder)
    frame = frame_of(tokenizer)
    least = max(2, len(frame) + 1)
    if not least <= length <= source.max_positions or count < 1:
        raise UsageError(
            f"cannot cut {count} segments of {length} tokens: the model takes {least} to "
            f"{source.max_positions} tokens at once",
            fix="use at least one segment, of a length that the model takes",
        )
    ids = segments.segments(
        text, tokenizer, count=count, length=length, seed=seed, by_row=by_row, further=further
    )
    _require_embeddings(source, ids, tokenizer)
    return ids[:count], ids[count:], frame


def _require_embeddings(
    source: Checkpoint, ids: Tensor, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse tokens for which the model has no embedding.

    Only tokens that occur in the segments are checked: many tokenizers define tokens beyond the
    embedding matrix that no text contains.

    Raises:
        ModelError: such a token occurs.
    """
    largest, rows = int(ids.max()), int(source.config.vocab_size)
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ModelError(
            f"{source.folder}: the tokenizer encodes this text with the token {token!r} "
            f"(id {largest}), but the model has embeddings only for ids below {rows}",
            fix="use the tokenizer that the model was trained with, or give the model the missing "
            "embeddings (resize_token_embeddings of transformers) and train them",
        )


def frame_for(source: Checkpoint) -> Frame:
    """Return the special tokens that segments for a model begin with."""
    return frame_of(load_tokenizer(source.folder))

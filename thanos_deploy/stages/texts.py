"""The texts that a request names: read, cut, and kept apart."""

from pathlib import Path

from torch import Tensor

from thanos_deploy.calibration import segments
from thanos_deploy.calibration.data import Data
from thanos_deploy.calibration.frame import Frame, frame_of
from thanos_deploy.calibration.texts import BUILTIN, Text, builtin_text, read_text
from thanos_deploy.errors import UsageError
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.load import load_tokenizer


def open_text(name: str, text_field: str, *, held_out: bool) -> Text:
    """The text of that name: a file, or one of the two parts of the built-in text.

    Args:
        name: "builtin" or a path.
        text_field: see `texts.read_text`.
        held_out: of the built-in text the part to judge on, not the one to calibrate on.

    Raises:
        CalibrationError: see `texts.read_text`.
    """
    if name == BUILTIN:
        return builtin_text(held_out=held_out)
    return read_text(Path(name).expanduser(), text_field=text_field)


def calibration(source: Checkpoint, data: Data) -> tuple[Text, Tensor, Frame]:
    """The text that a model is to be calibrated on, and what is taken of it.

    Returns:
        the text; int64[count, length]; what each of these begins with.

    Raises:
        CalibrationError, UsageError: see `open_text` and `segments_for`.
    """
    text = open_text(data.calib, data.text_field, held_out=False)
    ids, frame = segments_for(source, text, data.nsamples, data.seqlen, seed=data.seed)
    return text, ids, frame


def require_other_text(text: Text, calibration_sha256: str | None) -> None:
    """Refuse to judge a model on the text that it was calibrated on.

    Raises:
        UsageError: it is the same one, by its hash.
    """
    if text.sha256 == calibration_sha256:
        raise UsageError(
            f"{text.origin}: the model was calibrated on this text, so its perplexity on it "
            "says nothing",
            fix="give another text with --eval-text",
        )


def segments_for(
    source: Checkpoint, text: Text, count: int, length: int, *, seed: int | None
) -> tuple[Tensor, Frame]:
    """Cut a text into segments for a model; see `segments.segments`.

    Returns:
        int64[count, length], and what each of them begins with.

    Raises:
        CalibrationError: the text is too short.
        UsageError: the model does not take segments of that length.
    """
    tokenizer = load_tokenizer(source.folder)
    frame = frame_of(tokenizer)
    least = max(2, len(frame) + 1)
    if not least <= length <= source.max_positions or count < 1:
        raise UsageError(
            f"{count} segments of {length} tokens; the model takes {least} to "
            f"{source.max_positions} tokens at once",
            fix="use at least one segment, of a length that the model takes",
        )
    return segments.segments(text, tokenizer, count=count, length=length, seed=seed), frame


def frame_for(source: Checkpoint) -> Frame:
    """What segments for a model begin with."""
    return frame_of(load_tokenizer(source.folder))

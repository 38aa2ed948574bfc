"""Measure a model on a text: perplexity, last words, multiple choice, fidelity to the dense model.

The model reads the segments once, and most figures are taken from the logits of that pass. Multiple
choice, and the texts that the dense model writes, need passes of their own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from thanos_deploy.calibration.frame import Frame
from thanos_deploy.calibration.texts import Text
from thanos_deploy.measure import choices, cloze, fidelity, proportion
from thanos_deploy.measure.choices import Questions
from thanos_deploy.measure.cloze import LastWord, Offset
from thanos_deploy.measure.fidelity import Divergence, Outputs
from thanos_deploy.measure.perplexity import POSITIONS_AT_ONCE, Read, perplexity_of, reader
from thanos_deploy.measure.quality import Answers, Fidelity, TextQuality
from thanos_deploy.model.head import Head, has_plain_head, head_of, last_states
from thanos_deploy.progress import OnProgress, silent


@dataclass(frozen=True, slots=True, eq=False)
class Examination:
    """The segments and the questions of an evaluation.

    Attributes:
        origin: name of the text.
        ids: int64[count, length], tokens of the first segments of the text.
        frame: special tokens that each segment begins with.
        words: the last words to predict; see `measure.cloze`.
        questions: the multiple-choice questions; see `measure.choices`.
    """

    origin: str
    ids: Tensor
    frame: Frame
    words: Sequence[LastWord]
    questions: Questions

    @classmethod
    def of(
        cls,
        text: Text,
        tokenizer: PreTrainedTokenizerBase,
        ids: Tensor,
        frame: Frame,
        *,
        questions: int,
    ) -> "Examination":
        """Make an examination from a text and its segments.

        Args:
            text: the text.
            tokenizer: the tokenizer that made the segments.
            ids: int64[count, length], the first segments of the text, without overlap.
            frame: special tokens that each segment begins with.
            questions: the most multiple-choice questions.
        """
        own = ids.shape[1] - len(frame)
        encoded = tokenizer(
            text.content, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        every: list[Offset] = encoded["offset_mapping"][: len(ids) * own]
        offsets = [every[start : start + own] for start in range(0, len(every), own)]
        return cls(
            text.origin,
            ids,
            frame,
            cloze.last_words(text.content, offsets, len(frame)),
            choices.questions(text.content, offsets, ids, frame=len(frame), count=questions),
        )


def examine(
    model: PreTrainedModel,
    examination: Examination,
    dense: Outputs | None = None,
    head: Head | None = None,
    *,
    on_progress: OnProgress = silent,
) -> TextQuality:
    """Measure a model, and compare it with the dense model that it was made from.

    Args:
        model: in evaluation mode.
        examination: the segments and the questions.
        dense: outputs of the dense model; None to measure the model without a comparison.
        head: output head of the dense model, on the device of `model`; None for no divergence.
        on_progress: called after every segment.
    """
    read = reader(model)
    divergence = None
    if dense is not None and dense.states is not None and head is not None:
        divergence = Divergence(dense.states, head)
    value, likeliest = _read(read, examination, divergence, on_progress)
    quality = _quality(model, examination, value, likeliest)
    if dense is None:
        return quality.summary
    continued = torch.stack(
        [torch.cat([part.argmax(dim=-1) for part in read(row)]).cpu() for row in dense.written]
    )
    nats = None if divergence is None else divergence.mean
    near = fidelity.compared(nats, dense, likeliest, continued, len(examination.frame))
    return quality.beside(dense, near)


def examine_dense(
    model: PreTrainedModel,
    examination: Examination,
    longest: int,
    *,
    on_progress: OnProgress = silent,
) -> tuple[TextQuality, Outputs]:
    """Measure a dense model, and return its outputs to compare pruned models with.

    Args:
        model: in evaluation mode.
        examination: the segments and the questions.
        longest: the most tokens that the model takes.
        on_progress: called after every segment.
    """
    head = head_of(model)
    kept: list[Tensor] = []

    def keep_states(ids: Tensor) -> Iterator[Tensor]:
        states = last_states(model, ids[None].to(model.device))
        kept.append(states.cpu())
        return map(head, torch.split(states, POSITIONS_AT_ONCE))

    read = keep_states if has_plain_head(model) else reader(model)
    value, likeliest = _read(read, examination, None, on_progress)
    quality = _quality(model, examination, value, likeliest)
    return quality.summary, Outputs(
        states=torch.stack(kept) if kept else None,
        likeliest=likeliest,
        written=fidelity.written_by(model, examination.ids, longest),
        words=torch.tensor(quality.words, dtype=torch.bool),
        choices=torch.tensor(quality.choices, dtype=torch.bool),
    )


@dataclass(frozen=True, slots=True)
class _Quality:
    """The results of one model.

    Attributes:
        text: the perplexity and the sizes of the text.
        words, choices: for each question, whether the model's answer is right.
    """

    text: TextQuality
    words: Sequence[bool]
    choices: Sequence[bool]

    @property
    def summary(self) -> TextQuality:
        """The results without a comparison."""
        return replace(self.text, words=_answers(self.words), choices=_answers(self.choices))

    def beside(self, dense: Outputs, near: Fidelity) -> TextQuality:
        """The results compared with those of the dense model."""
        return replace(
            self.text,
            words=_answers(self.words, dense.words),
            choices=_answers(self.choices, dense.choices),
            fidelity=near,
        )


def _read(
    read: Read,
    examination: Examination,
    divergence: Divergence | None,
    on_progress: OnProgress,
) -> tuple[float, Tensor]:
    """Let a model read the segments.

    Args:
        read: reads a segment with the model.
        examination: the segments.
        divergence: divergence from the dense model, to which this adds; None to measure none.
        on_progress: see `examine`.

    Returns:
        the perplexity, and int64[count, length], the likeliest token after each token.
    """
    ids, frame = examination.ids, len(examination.frame)
    likeliest = torch.empty_like(ids)
    numbers = iter(range(len(ids)))

    def losses(segment: Tensor) -> Iterator[Tensor]:
        number, at = next(numbers), 0
        for logits in read(segment):
            log_p = logits.float().log_softmax(dim=-1)
            likeliest[number, at : at + len(log_p)] = log_p.argmax(dim=-1)
            following = segment[at + 1 : at + 1 + len(log_p)].to(log_p.device)
            scored = log_p[: len(following)]
            yield -scored.gather(1, following[:, None]).squeeze(1)
            if divergence is not None:
                unscored = max(0, max(frame, 1) - 1 - at)
                divergence.add(number, at + unscored, scored[unscored:])
            at += len(log_p)

    with torch.inference_mode():
        found = perplexity_of(losses, ids, frame=frame, on_progress=on_progress)
    return found.value, likeliest


def _quality(
    model: PreTrainedModel, examination: Examination, value: float, likeliest: Tensor
) -> _Quality:
    """Let a model answer the multiple-choice questions, and collect all of its results."""
    ids = examination.ids
    count, length = ids.shape
    text = TextQuality(examination.origin, value, count, length, examination.frame)
    words = cloze.answered(examination.words, ids, likeliest)
    return _Quality(text, words, choices.answered(model, examination.questions))


def _answers(right: Sequence[bool], before: Tensor | None = None) -> Answers | None:
    """Summarise answers, compared with the dense model's if given; None without questions."""
    if not right:
        return None
    return Answers(
        questions=len(right),
        accuracy=proportion.share(sum(right), len(right)),
        change=None if before is None else proportion.change(before.tolist(), right),
    )

"""Multiple choice: a model has to recognise the true continuation of a passage among four.

The questions are made from the text that perplexity is measured on. Each has a beginning of
`BEFORE` tokens and four continuations of `AFTER` tokens: the true one, and three from elsewhere in
the same segment, so that they are about the same subject. All continuations begin at the beginning
of a word. Their places are drawn with a fixed seed; the four continuations of a question overlap
neither one another nor its beginning. A model's answer is the continuation with the largest
probability. All continuations have equally many tokens, so the length needs no correction.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from thanos_deploy.measure.cloze import Offset
from thanos_deploy.progress import OnProgress, silent

BEFORE, AFTER = 24, 6
CHOICES = 4
_SEED = 0

# Questions in a batch.
_AT_ONCE = 8


@dataclass(frozen=True, slots=True, eq=False)
class Questions:
    """Multiple-choice questions, as tokens.

    Attributes:
        beginnings: int64[count, frame + BEFORE].
        continuations: int64[count, CHOICES, AFTER]; the first choice is the right one.
    """

    beginnings: Tensor
    continuations: Tensor

    def __len__(self) -> int:
        return len(self.beginnings)


def questions(
    content: str, offsets: Sequence[Sequence[Offset]], ids: Tensor, *, frame: int, count: int
) -> Questions:
    """Make questions from the segments of a text; see the module.

    Args:
        content: the text.
        offsets: for each segment, the offsets in the text of the tokens after its frame.
        ids: int64[segments, length], the segments, each with the frame in front of it.
        frame: number of tokens of the frame.
        count: the most questions; there are fewer if the segments have no place for more.
    """
    own = ids[:, frame:]
    places = [
        [at for at in range(BEFORE, len(segment) - AFTER + 1) if _begins_word(content, segment[at])]
        for segment in offsets
    ]
    draw = random.Random(_SEED)
    every = [(segment, at) for segment, some in enumerate(places) for at in some]
    draw.shuffle(every)
    beginnings: list[Tensor] = []
    continuations: list[Tensor] = []
    for segment, at in every:
        if len(beginnings) == count:
            break
        others = _elsewhere(places[segment], at, draw)
        if others is not None:
            beginnings.append(torch.cat([ids[segment, :frame], own[segment, at - BEFORE : at]]))
            continuations.append(
                torch.stack([own[segment, one : one + AFTER] for one in (at, *others)])
            )
    if not beginnings:
        return Questions(ids.new_empty(0, frame + BEFORE), ids.new_empty(0, CHOICES, AFTER))
    return Questions(torch.stack(beginnings), torch.stack(continuations))


def _begins_word(content: str, offset: Offset) -> bool:
    """Whether a token begins a word: with a letter, after a character that is no part of a word."""
    token = content[slice(*offset)]
    word = token.lstrip()
    at = offset[0] + len(token) - len(word)
    before = content[at - 1] if at else " "
    return word[:1].isalpha() and not (before.isalnum() or before == "_")


def _elsewhere(places: Sequence[int], at: int, draw: random.Random) -> list[int] | None:
    """Draw the places of the wrong continuations; None if there are too few.

    They overlap neither one another nor the tokens of the question, which surround `at`.
    """
    apart = [one for one in places if one + AFTER <= at - BEFORE or one >= at + AFTER]
    found: list[int] = []
    for one in draw.sample(apart, len(apart)):
        if all(abs(one - other) >= AFTER for other in found):
            found.append(one)
        if len(found) == CHOICES - 1:
            return found
    return None


@torch.inference_mode()
def answered(
    model: PreTrainedModel, asked: Questions, *, on_progress: OnProgress = silent
) -> list[bool]:
    """Answer the questions with a model.

    The model reads each beginning once for its four continuations.

    Args:
        model: in evaluation mode.
        asked: the questions.
        on_progress: called after every batch of questions.

    Returns:
        for each question, whether the model's answer is right.
    """
    found: list[bool] = []
    on_progress(0, len(asked))
    for first in range(0, len(asked), _AT_ONCE):
        some = slice(first, first + _AT_ONCE)
        scores = _log_probabilities(model, asked.beginnings[some], asked.continuations[some])
        found += (scores.argmax(dim=1) == 0).tolist()
        on_progress(len(found), len(asked))
    return found


def _log_probabilities(model: PreTrainedModel, beginnings: Tensor, continuations: Tensor) -> Tensor:
    """float32[count, choices], the log-probability of each continuation after its beginning."""
    count, choices, _ = continuations.shape
    after = continuations.flatten(0, 1).to(model.device)
    read = model(input_ids=beginnings.to(model.device), use_cache=True, logits_to_keep=1)
    first = read.logits.repeat_interleave(choices, dim=0)
    cache = read.past_key_values
    cache.batch_repeat_interleave(choices)
    rest = model(input_ids=after[:, :-1], past_key_values=cache, use_cache=True).logits
    logits = torch.cat([first, rest], dim=1).float().log_softmax(dim=-1)
    told = logits.gather(2, after[..., None]).squeeze(2).sum(dim=1)
    return told.reshape(count, choices).cpu()

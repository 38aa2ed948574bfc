"""Text of the dense model's own making, for the pruned one to learn from.

Calibration text runs out, and a model knows more kinds of text than a user has at hand. So the
dense model writes more of it (LLM-QAT: Liu et al., arXiv 2305.17888): it goes on from beginnings of
the calibration text, or, where it is made for conversations, from the words that its chat template
puts before a question, so that it asks and answers (Magpie: Xu et al., arXiv 2406.08464). Each
token is drawn from the `_LIKELIEST` likeliest ones.

Small models fall into loops, and drift to code, tables and lists of links. A piece is dropped if it
repeats itself more, or has a larger share of signs, than `_USUAL` of the pieces of the calibration
text; so nothing is said about which text is good, and a model calibrated on code keeps its code.

Pieces are drawn in batches, each with a seed of its own, so that what is written does not depend on
the number of ranks, which write batches side by side.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from thanos_deploy.errors import CalibrationError
from thanos_deploy.progress import OnProgress, silent
from thanos_deploy.ranks.group import current

# Tokens of the calibration text that a piece begins with.
_BEGINNING = 16

_LIKELIEST = 50

# Pieces that are drawn at once.
_BATCH = 64

# A piece is refused if it is farther out than this share of the calibration text's.
_USUAL = 0.99

# Tokens that make one repetition.
_REPEATED = 4

# What prose has beside letters, digits and spaces.
_PUNCTUATION = frozenset(".,;:!?'\"()-\u2013\u2014\u2018\u2019\u201c\u201d\u2026")

# Pieces that are drawn at most, for each that is needed.
_PATIENCE = 4


@dataclass(frozen=True, slots=True)
class Habits:
    """How far text may repeat itself, and how many signs it may have.

    Attributes:
        repeats: the largest share of runs of `_REPEATED` tokens that occurred before in the piece.
        signs: the largest share of characters that prose does not have.
    """

    repeats: float
    signs: float

    @classmethod
    def of(cls, pieces: Tensor, tokenizer: PreTrainedTokenizerBase) -> "Habits":
        """Those of a text.

        Args:
            pieces: int64[count, length] of it.
            tokenizer: that made them.
        """
        shares = [
            torch.tensor([measure(piece) for piece in pieces.tolist()], dtype=torch.float64)
            for measure in (repeats, lambda piece: signs(_shown(piece, tokenizer)))
        ]
        return cls(*(float(share.quantile(_USUAL, interpolation="higher")) for share in shares))

    def allow(self, piece: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
        """A piece is no farther out than the text."""
        return repeats(piece) <= self.repeats and signs(_shown(piece, tokenizer)) <= self.signs


def repeats(piece: Sequence[int]) -> float:
    """The share of the runs of `_REPEATED` tokens that occurred before."""
    runs = list(zip(*(piece[start:] for start in range(_REPEATED)), strict=False))
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


def signs(text: str) -> float:
    """The share of the characters that are no letter, digit or space, nor of prose."""
    odd = sum(not (one.isalnum() or one.isspace() or one in _PUNCTUATION) for one in text)
    return odd / len(text) if text else 1.0


def _shown(piece: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode([*piece], skip_special_tokens=True))


def before_question(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template puts before a question.

    Raises:
        CalibrationError: there is no template, or it says more than the question's own words.
    """
    question = "QUESTION"
    written = ""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": question}]
        written = str(tokenizer.apply_chat_template(messages, tokenize=False))
    before, found, _ = written.partition(question)
    if not found:
        raise CalibrationError(
            f"--recover-text chat: {tokenizer.name_or_path} has no chat template that a "
            "question can be inserted into",
            fix="use --recover-text own, or a model that is made for conversations",
        )
    return before


def beginnings(
    pieces: Tensor, frame: int, tokenizer: PreTrainedTokenizerBase, *, chat: bool, seed: int
) -> Callable[[int], Tensor]:
    """What the pieces of each batch begin with.

    Args:
        pieces: int64[count, length] of the calibration text.
        frame: tokens that are put before each.
        tokenizer: of the model.
        chat: begin a conversation.
        seed: of the choice among the calibration text's.

    Returns:
        from the number of a batch to int64[batch, tokens].

    Raises:
        CalibrationError: see `before_question`.
    """
    if chat:
        ids = tokenizer(before_question(tokenizer), add_special_tokens=False)["input_ids"]
        return lambda _: torch.tensor(ids, dtype=torch.int64).expand(_BATCH, -1)
    some = pieces[:, : frame + _BEGINNING]
    return lambda batch: some[torch.randint(len(some), (_BATCH,), generator=_draw(seed, batch))]


@torch.inference_mode()
def sampled(model: PreTrainedModel, begun: Tensor, length: int, draw: torch.Generator) -> Tensor:
    """int64[batch, length], beginnings that a model goes on from by drawing tokens.

    Args:
        model: in evaluation mode.
        begun: int64[batch, tokens], the beginnings.
        length: tokens of the whole.
        draw: on the CPU.
    """
    found, cache = [begun], None
    for _ in range(length - begun.shape[1]):
        read = model(input_ids=found[-1].to(model.device), past_key_values=cache, use_cache=True)
        cache = read.past_key_values
        likeliest = read.logits[:, -1].float().cpu().topk(_LIKELIEST)
        drawn = torch.multinomial(likeliest.values.softmax(dim=-1), 1, generator=draw)
        found.append(likeliest.indices.gather(1, drawn))
    return torch.cat(found, dim=1)


def own_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    begin: Callable[[int], Tensor],
    habits: Habits,
    *,
    count: int,
    length: int,
    seed: int,
    on_progress: OnProgress = silent,
) -> tuple[list[str], int]:
    """So many pieces of text that a model writes; see the module. All ranks write together.

    Args:
        model: the dense one.
        tokenizer: its own.
        begin: see `beginnings`.
        habits: of the calibration text.
        count: of pieces that are kept.
        length: tokens of each.
        seed: of all draws.
        on_progress: told of the pieces that there are.

    Returns:
        the pieces, and how many were drawn for them.

    Raises:
        CalibrationError: nearly all that the model writes is dropped.
    """
    kept: list[str] = []
    drawn = 0
    on_progress(0, count)
    for pieces in _batches(model, begin, length, seed):
        drawn += len(pieces)
        kept += [
            str(tokenizer.decode(list(one), skip_special_tokens=False))
            for one in pieces
            if habits.allow(one, tokenizer)
        ]
        on_progress(min(len(kept), count), count)
        if len(kept) >= count:
            return kept[:count], drawn
        if drawn >= _PATIENCE * max(count, _BATCH):
            break
    raise CalibrationError(
        f"--recover-text: of {drawn} pieces that the dense model wrote, "
        f"{drawn - len(kept)} were dropped, because they repeat themselves or have more "
        f"symbols than the calibration text; {count} pieces are needed",
        fix="use --recover-text calib, or calibration text like the text that the model generates",
    )


@dataclass(frozen=True, slots=True)
class _Drawn:
    """The ids of a batch of pieces, as one rank has drawn it."""

    pieces: tuple[tuple[int, ...], ...]


def _batches(
    model: PreTrainedModel, begin: Callable[[int], Tensor], length: int, seed: int
) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Batches in the order of their numbers, each rank drawing the next one at the same time."""
    ranks, turn = current(), 0
    while True:
        batch = turn * ranks.size + ranks.rank
        own = sampled(model, begin(batch), length, _draw(seed, batch))
        for drawn in ranks.gather(_Drawn(tuple(map(tuple, own.tolist())))):
            yield drawn.pieces
        turn += 1


def _draw(seed: int, batch: int) -> torch.Generator:
    """Of a batch, whatever was drawn before it."""
    return torch.Generator().manual_seed((seed << 20) + batch)

"""Text that the dense model generates, for the pruned model to learn from.

Calibration text is limited, and a model knows more kinds of text than a user has at hand. So the
dense model generates more text (LLM-QAT: Liu et al., arXiv 2305.17888): it continues beginnings of
the calibration text. A chat model can begin instead with the text that its chat template puts
before a question, so that it writes both question and answer (Magpie: Xu et al., arXiv 2406.08464).
Each token is sampled from the `_LIKELIEST` most likely tokens.

Small models fall into loops, and drift to code, tables and lists of links. A piece is dropped if it
repeats itself more, or has a larger share of symbols, than a fraction `_USUAL` of the pieces of the
calibration text. The calibration text alone sets these limits, so a model calibrated on code keeps
its code.

Pieces are sampled in batches, each with a seed of its own. So the text does not depend on the
number of ranks, which sample batches side by side.
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

# Number of most likely tokens from which the next one is sampled.
_LIKELIEST = 50

# Pieces that are sampled together.
_BATCH = 64

# Quantile over the pieces of the calibration text beyond which a generated piece is dropped.
_USUAL = 0.99

# Length of a run of tokens that counts as a repetition.
_REPEATED = 4

# Characters of prose besides letters, digits and spaces.
_PUNCTUATION = frozenset(".,;:!?'\"()-\u2013\u2014\u2018\u2019\u201c\u201d\u2026")

# Largest number of pieces that are sampled for each piece that is needed.
_PATIENCE = 4


@dataclass(frozen=True, slots=True)
class Habits:
    """Limits on the repetitions and the symbols of a piece of text.

    Attributes:
        repeats: largest share of runs of `_REPEATED` tokens that occurred earlier in the piece.
        signs: largest share of symbols, the characters that prose does not have.
    """

    repeats: float
    signs: float

    @classmethod
    def of(cls, pieces: Tensor, tokenizer: PreTrainedTokenizerBase) -> "Habits":
        """Measure the limits on the pieces of a text.

        Args:
            pieces: int64[count, length], the token ids of the pieces.
            tokenizer: the tokenizer of these ids.
        """
        shares = [
            torch.tensor([measure(piece) for piece in pieces.tolist()], dtype=torch.float64)
            for measure in (repeats, lambda piece: signs(_shown(piece, tokenizer)))
        ]
        return cls(*(float(share.quantile(_USUAL, interpolation="higher")) for share in shares))

    def allow(self, piece: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether a piece is within the limits."""
        return repeats(piece) <= self.repeats and signs(_shown(piece, tokenizer)) <= self.signs


def repeats(piece: Sequence[int]) -> float:
    """The share of the runs of `_REPEATED` tokens that occurred earlier in the piece."""
    runs = list(zip(*(piece[start:] for start in range(_REPEATED)), strict=False))
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


def signs(text: str) -> float:
    """The share of the characters that are not letters, digits, spaces or punctuation of prose."""
    odd = sum(not (one.isalnum() or one.isspace() or one in _PUNCTUATION) for one in text)
    return odd / len(text) if text else 1.0


def _shown(piece: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode([*piece], skip_special_tokens=True))


def before_question(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that the chat template puts before a question.

    Raises:
        CalibrationError: there is no chat template, or the question is not found in its output.
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
    """Return a function that gives the tokens with which the pieces of a batch begin.

    Args:
        pieces: int64[count, length], pieces of the calibration text.
        frame: number of tokens, such as BOS, that come before the text of each piece.
        tokenizer: tokenizer of the model.
        chat: begin a conversation instead of continuing the calibration text.
        seed: seed of the choice among the pieces.

    Returns:
        a function from the number of a batch to int64[batch, tokens].

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
    """Continue beginnings by sampling tokens from a model; int64[batch, length].

    Args:
        model: the model, in evaluation mode.
        begun: int64[batch, tokens], the beginnings.
        length: number of tokens of each result, the beginning included.
        draw: random generator, on the CPU.
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
    """Generate pieces of text with a model, on all ranks together; see the module.

    Args:
        model: the dense model.
        tokenizer: tokenizer of the model.
        begin: see `beginnings`.
        habits: limits on the pieces, from the calibration text.
        count: number of pieces to keep.
        length: number of tokens of each piece.
        seed: seed of all sampling.
        on_progress: called with the number of pieces kept so far.

    Returns:
        the pieces, and how many were sampled to get them.

    Raises:
        CalibrationError: more than three quarters of the sampled pieces are dropped.
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
    """The token ids of one batch of pieces, as sampled by one rank."""

    pieces: tuple[tuple[int, ...], ...]


def _batches(
    model: PreTrainedModel, begin: Callable[[int], Tensor], length: int, seed: int
) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Yield batches in the order of their numbers; the ranks sample them side by side."""
    ranks, turn = current(), 0
    while True:
        batch = turn * ranks.size + ranks.rank
        own = sampled(model, begin(batch), length, _draw(seed, batch))
        for drawn in ranks.gather(_Drawn(tuple(map(tuple, own.tolist())))):
            yield drawn.pieces
        turn += 1


def _draw(seed: int, batch: int) -> torch.Generator:
    """The random generator of a batch, which does not depend on earlier batches."""
    return torch.Generator().manual_seed((seed << 20) + batch)

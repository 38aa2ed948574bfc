"""The options of a request for generation, the same for every route."""

from collections.abc import Mapping
from dataclasses import dataclass

from runtime.sampling import Sampling


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """The options that a request gives for its answers.

    Attributes:
        copies: number of answers to each prompt, with seeds that count up.
        new_tokens: largest number of tokens of an answer; None for `usual_tokens`.
        usual_tokens: largest number of tokens if `new_tokens` is None, fewer if there is less room;
            None for as many as there is room for.
        min_tokens: number of tokens before which an answer does not end.
        sampling: how to choose the tokens.
        bias: maps ids to values that are added to their logits.
        stop: texts that end an answer.
        stop_ids: ids that end an answer, beside the model's own.
        ignore_eos: the model's own ids do not end an answer.
        alternatives: number of likeliest tokens whose log probabilities are reported beside each
            token's own; None for no log probabilities.
        echo: an answer begins with its prompt.
    """

    copies: int
    new_tokens: int | None
    usual_tokens: int | None
    min_tokens: int
    sampling: Sampling
    bias: Mapping[int, float]
    stop: tuple[str, ...]
    stop_ids: frozenset[int]
    ignore_eos: bool
    alternatives: int | None
    echo: bool = False

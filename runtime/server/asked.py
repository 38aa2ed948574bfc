"""What a request asks for beside its prompt, whichever route it came by."""

from collections.abc import Mapping
from dataclasses import dataclass

from runtime.sampling import Sampling


@dataclass(frozen=True, slots=True)
class Asked:
    """Of every answer.

    Attributes:
        copies: answers to each prompt, drawn with seeds that count up.
        new_tokens: the most tokens of an answer; None for the usual.
        usual_tokens: fewer where there is less room; None for as many as there is room for.
        min_tokens: before so many tokens, an answer does not end.
        sampling: how to choose.
        bias: added to the logits of these ids.
        stop: texts that end an answer.
        stop_ids: ids that end an answer, beside those of the model.
        ignore_eos: those of the model end none.
        alternatives: log probabilities beside each token's; None for none.
        echo: the prompt comes before its answer.
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

"""Continuous batching: the sequences of several requests are decoded together.

A request waits for a slot, its prompt is read, and it becomes a row of the batch until its text
ends. Rows join and leave between two steps, so no request waits for the text of another one to end.
The logits of a row do not depend on the other rows except for floating-point rounding, and every
request has its own random numbers: the same request with the same seed gets the same tokens.

ORT-GenAI has a batching engine of its own, which cannot do this with our graph: on a CPU it takes
at most four requests together, admits no other request before the last of them has ended, and
reports no log probabilities. Its dynamic batching needs a graph with paged attention, which exists
on CUDA only (`benchmarks/genai_engine.py`, `benchmarks/LOG.md`).
"""

from runtime.batching.batcher import PROMPT_TOKENS, Batcher, Busy, State
from runtime.batching.logprobs import token_of
from runtime.batching.requests import Constraint, Deliver, End, Finish, Request, Token
from runtime.batching.texts import Ticket

__all__ = [
    "PROMPT_TOKENS",
    "Batcher",
    "Busy",
    "Constraint",
    "Deliver",
    "End",
    "Finish",
    "Request",
    "State",
    "Ticket",
    "Token",
    "token_of",
]

"""Continuous batching: the sequences of several requests take their steps together.

A request waits for a slot, its prompt is read, and it becomes a row of the batch until its text
ends. Rows join and leave between two steps, so no request waits for the end of another's text. What
a row computes does not depend on the others but for the rounding of floats, and a request draws
from a random stream of its own: the same request with the same seed gets the same tokens.

ORT-GenAI has a batching engine of its own, which does not do this with our graph: on a CPU it takes
at most four requests together, lets no other one join before the last of them has ended, and
reports no log probabilities; its dynamic batching wants a graph of paged attention, which exists on
CUDA only (`benchmarks/genai_engine.py`, `benchmarks/LOG.md`).
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

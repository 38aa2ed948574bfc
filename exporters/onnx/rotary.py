"""Rotary embeddings that ONNX Runtime's attention applies itself, from a table.

The models of transformers compute cosines and sines of the positions in one module, and rotate
queries and keys in one function, whose code differs from model type to model type. How the function
pairs channels is found by calling it on random numbers, so no list of model types is needed.
"""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

PARTS = ("cos", "sin")

# Name of the rotating function in the modelling files of transformers.
_ROTATE = "apply_rotary_pos_emb"

# The CPU kernel needs the channels of a head, and its rotated pairs, to be multiples of these.
_CHANNELS, _PAIRS = 16, 8

# Cosines and sines of every position: float32[positions, pairs] each.
Tables = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Rotation:
    """How the operator rotates the queries and keys of a block.

    Attributes:
        table: index of the tables with the cosines and sines.
        interleaved: neighbouring channels form a pair; otherwise channel i of the first half and
            channel i of the second half of the rotated channels.
    """

    table: int
    interleaved: bool


@dataclass(frozen=True, slots=True)
class Seen:
    """A rotation that was observed in a run of a model.

    Attributes:
        angles: computes its cosines and sines; None if their origin is not known.
        interleaved: see `Rotation`; None if the operator cannot do this rotation.
    """

    angles: "_Angles | None"
    interleaved: bool | None


@dataclass(frozen=True, slots=True)
class _Angles:
    """The function that computes cosines and sines, with the arguments beside the positions."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    options: tuple[object, ...]

    def tables(self, positions: int) -> Tables | None:
        """Tables for positions from 0 on; None if the two halves of the channels differ."""
        places = torch.arange(positions)[None]
        cos, sin = self.forward(torch.zeros(1), places, *self.options)
        halves = [part[0].chunk(2, dim=-1) for part in (cos, sin)]
        if not all(torch.equal(*pair) for pair in halves):
            return None
        return halves[0][0].contiguous(), halves[1][0].contiguous()


def name(index: int, part: str) -> str:
    """Return the name of a table in a graph; `part` is one of `PARTS`."""
    return f"rotary_{index}_{part}"


def is_table(initializer: str) -> bool:
    """Whether an initializer of a graph has the name of a table."""
    return re.fullmatch(r"rotary_\d+_(cos|sin)", initializer) is not None


@contextmanager
def without_dynamic_scaling(model: PreTrainedModel) -> Iterator[None]:
    """Within the `with` statement, switch off dynamic NTK scaling.

    It begins beyond `max_position_embeddings`. No graph is made for texts of such a length, and a
    trace cannot follow a decision that depends on the length.
    """
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "rope_type")]
    kinds: list[Any] = [module.rope_type for module in modules]
    for module, kind in zip(modules, kinds, strict=True):
        module.rope_type = (
            {layer: _static(its) for layer, its in kind.items()}
            if isinstance(kind, dict)
            else _static(kind)
        )
    try:
        yield
    finally:
        for module, kind in zip(modules, kinds, strict=True):
            module.rope_type = kind


def _static(kind: str) -> str:
    return "default" if "dynamic" in kind else kind


@contextmanager
def watched(model: PreTrainedModel, seen: list[Seen]) -> Iterator[None]:
    """Within the `with` statement, append every rotation that the model makes to `seen`."""
    angles: list[tuple[Tensor, _Angles]] = []

    def note_angles(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: Tensor, position_ids: Tensor, *rest: object, **named: object) -> Any:
            options = (*rest, *named.values())
            made = forward(x, position_ids, *options)
            angles.append((made[0], _Angles(forward, options)))
            return made

        return run

    def note_rotation(rotate: Callable[..., Any]) -> Callable[..., Any]:
        def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Any:
            known = [its for one, its in angles if one is cos]
            plain = known and not rest and not named
            seen.append(
                Seen(known[-1], _interleaved(rotate, q, cos, sin)) if plain else Seen(None, None)
            )
            return rotate(q, k, cos, sin, *rest, **named)

        return run

    with ExitStack() as stack:
        for module in model.modules():
            if hasattr(module, "rope_type"):
                stack.enter_context(_instead(module, "forward", note_angles(module.forward)))
        for code in _codes(model):
            stack.enter_context(_instead(code, _ROTATE, note_rotation(getattr(code, _ROTATE))))
        yield


@contextmanager
def left_out(model: PreTrainedModel) -> Iterator[None]:
    """Within the `with` statement, the model does not rotate queries and keys."""

    def leave(q: Tensor, k: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return q, k

    with ExitStack() as stack:
        for code in _codes(model):
            stack.enter_context(_instead(code, _ROTATE, leave))
        yield


def tables_of(
    blocks: Sequence[Sequence[Seen]], positions: int
) -> tuple[tuple[Rotation | None, ...], tuple[Tables, ...]]:
    """Return the operator's rotation for each block, and the tables that they refer to.

    If the operator cannot do the rotation of some block, it rotates in none.

    Args:
        blocks: for each block, the rotations observed before its attention.
        positions: number of positions in the tables.
    """
    nowhere = (None,) * len(blocks), ()
    tables: dict[_Angles, Tables] = {}
    rotations: list[Rotation | None] = []
    for seen in blocks:
        if not seen:
            rotations.append(None)
            continue
        (angles, interleaved) = (seen[0].angles, seen[0].interleaved)
        if len(seen) > 1 or angles is None or interleaved is None:
            return nowhere
        if angles not in tables:
            made = angles.tables(positions)
            if made is None:
                return nowhere
            tables[angles] = made
        rotations.append(Rotation(list(tables).index(angles), interleaved))
    return tuple(rotations), tuple(tables.values())


def _interleaved(rotate: Callable[..., Any], like: Tensor, cos: Tensor, sin: Tensor) -> bool | None:
    """Find `Rotation.interleaved` of a rotating function; None if the operator cannot do it.

    Args:
        rotate: the function.
        like: float[batch, heads, sequence, dim], for the shape of the random numbers.
        cos, sin: [batch, sequence, rotated channels].
    """
    pairs = cos.shape[-1] // 2
    if like.shape[-1] % _CHANNELS or pairs % _PAIRS or 2 * pairs > like.shape[-1]:
        return None
    x = torch.randn(like.shape, generator=torch.Generator().manual_seed(0))
    rotated = rotate(x, x, cos, sin)[0]
    c, s = (part[:, None, :, :pairs] for part in (cos, sin))
    for interleaved in (False, True):
        expected = x.clone()
        one, other = (
            slice(place, 2 * pairs, 2) if interleaved else slice(place * pairs, (place + 1) * pairs)
            for place in (0, 1)
        )
        expected[..., one] = x[..., one] * c - x[..., other] * s
        expected[..., other] = x[..., other] * c + x[..., one] * s
        if torch.allclose(rotated, expected, atol=1e-5):
            return interleaved
    return None


def _codes(model: PreTrainedModel) -> list[ModuleType]:
    """Python modules that define the model's classes and have the rotating function."""
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    return sorted(
        (code for code in files if hasattr(code, _ROTATE)), key=lambda code: code.__name__
    )


@contextmanager
def _instead(owner: Any, attribute: str, value: object) -> Iterator[None]:
    """Within the `with` statement, an attribute of an object has another value."""
    own = vars(owner).get(attribute)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        delattr(owner, attribute)
        if own is not None:
            setattr(owner, attribute, own)

"""Forward passes that stop where they reach a layer.

A layer's statistics are wanted when all layers before it are final. So the pass of every batch
stops there, and the layer is pruned. Where there is memory for it, passes wait there and go on
afterwards, so that nothing is computed twice: each such pass has a greenlet, which keeps its calls
as they are while others run, so the code of a block needs to know nothing of it. One runs at a
time, in one thread: results do not depend on timing. Elsewhere a pass is broken off and the next
one starts at the block's input, which takes longer, gives the same numbers, and needs no greenlets.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec

from torch import Tensor, nn

from thanos_deploy.model.linear import entrance


def can_wait() -> bool:
    """The package greenlet is there, without which every pass starts at the block's input."""
    return find_spec("greenlet") is not None


class Pass:
    """One forward pass on its way through a block, which can wait in it."""

    def __init__(self, forward: Callable[[], Tensor]) -> None:
        """Prepare a pass; nothing runs yet."""
        from greenlet import greenlet  # only here, so that nothing else needs it

        self._greenlet = greenlet(forward)

    def until(self, block: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
        """Go on as far as the last of some layers, none of which has been passed, and wait there.

        Args:
            block: what the pass runs through.
            names: layers of it, in the order in which the pass reaches them.

        Returns:
            layer name -> [tokens, cols], what it reads.
        """
        inputs: dict[str, Tensor] = {}
        with recorded(block, names, inputs, at_last=self._wait):
            self._greenlet.switch()
        return inputs

    def finish(self) -> Tensor:
        """Go on to the end; what leaves the block."""
        hidden: Tensor = self._greenlet.switch()
        return hidden

    def _wait(self) -> None:
        self._greenlet.parent.switch()


class _ReachedError(Exception):
    """Ends a pass that has reached what it was started for."""


def inputs_until(
    forward: Callable[[], Tensor], block: nn.Module, names: Sequence[str]
) -> dict[str, Tensor]:
    """Run a block as far as the last of some layers, and break off.

    Args:
        forward: runs the block.
        block: the block.
        names: layers of it, in the order in which a pass reaches them.

    Returns:
        layer name -> [tokens, cols], what it reads.
    """
    inputs: dict[str, Tensor] = {}
    with recorded(block, names, inputs, at_last=_break_off), suppress(_ReachedError):
        forward()
    return inputs


def _break_off() -> None:
    raise _ReachedError


def _go_on() -> None:
    pass


@contextmanager
def recorded(
    block: nn.Module,
    names: Sequence[str],
    inputs: dict[str, Tensor],
    *,
    at_last: Callable[[], None] = _go_on,
) -> Iterator[None]:
    """Keep what the named layers read while the block runs, [tokens, cols] each.

    Args:
        block: where the layers are.
        names: the layers, in the order in which a pass reaches them.
        inputs: where to keep it.
        at_last: what to do at the last of them, before it runs.
    """

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs[name] = arguments[0].reshape(-1, arguments[0].shape[-1])
            if name == names[-1]:
                at_last()

        return hook

    handles = [entrance(block, name).register_forward_pre_hook(keep(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

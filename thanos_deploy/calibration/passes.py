"""Forward passes that stop when they reach a layer.

The statistics of a layer are collected when all layers before it are final. So the forward pass of
every batch stops at that layer, and the layer is pruned.

If there is enough memory, the passes wait there and continue afterwards, so that nothing is
computed twice. Each waiting pass has a greenlet, which keeps its call stack while others run, so
the code of a block needs no change. One greenlet runs at a time, in one thread, so results do not
depend on timing. Otherwise a pass is aborted, and the next one starts at the block's input: that
takes longer, gives the same numbers, and needs no greenlets.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec

from torch import Tensor, nn

from thanos_deploy.model.linear import entrance


def can_wait() -> bool:
    """Whether the package greenlet is installed; without it, every pass starts at the input."""
    return find_spec("greenlet") is not None


class Pass:
    """A forward pass through a block that can wait at a layer."""

    def __init__(self, forward: Callable[[], Tensor]) -> None:
        """Prepare a pass; nothing runs yet."""
        from greenlet import greenlet  # optional dependency

        self._greenlet = greenlet(forward)

    def until(self, block: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
        """Continue to the last of some layers, and wait before it runs.

        Args:
            block: the block of the pass.
            names: layers of it that the pass has not reached yet, in the order of the pass.

        Returns:
            layer name -> [tokens, cols], its input.
        """
        inputs: dict[str, Tensor] = {}
        with recorded(block, names, inputs, at_last=self._wait):
            self._greenlet.switch()
        return inputs

    def finish(self) -> Tensor:
        """Continue to the end, and return the output of the block."""
        hidden: Tensor = self._greenlet.switch()
        return hidden

    def _wait(self) -> None:
        self._greenlet.parent.switch()


class _ReachedError(Exception):
    """Aborts a pass at the last layer that it was started for."""


def inputs_until(
    forward: Callable[[], Tensor], block: nn.Module, names: Sequence[str]
) -> dict[str, Tensor]:
    """Run a block up to the last of some layers, and abort the pass there.

    Args:
        forward: runs the block.
        block: the block.
        names: layers of it, in the order in which a pass reaches them.

    Returns:
        layer name -> [tokens, cols], its input.
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
    """Record the inputs of the named layers while the block runs.

    Args:
        block: where the layers are.
        names: the layers, in the order in which a pass reaches them.
        inputs: filled with layer name -> [tokens, cols], its input.
        at_last: called when the pass reaches the last layer, before that layer runs.
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

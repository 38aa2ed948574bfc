"""A forward pass that stops where it reaches a layer, and goes on from there later.

A layer's statistics are wanted when all layers before it are final. So the pass of every batch
stops there, the layer is pruned, and the passes go on: nothing is computed twice. Each pass has a
greenlet, which keeps its calls as they are while others run, so the code of a block needs to know
nothing of it. One runs at a time, in one thread: results do not depend on timing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from thanos_deploy.errors import PlatformError
from thanos_deploy.model.linear import entrance


class Pass:
    """One forward pass on its way through a block."""

    def __init__(self, forward: Callable[[], Tensor]) -> None:
        """Prepare a pass; nothing runs yet.

        Raises:
            PlatformError: the package greenlet is not installed.
        """
        try:
            from greenlet import greenlet  # only here, so that statistics do not need it
        except ImportError as error:
            raise PlatformError(
                "pruning needs the package greenlet, which is not installed",
                fix="pip install greenlet",
            ) from error
        self._greenlet = greenlet(forward)

    def until(self, block: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
        """Go on as far as the last of some layers, none of which has been passed.

        Args:
            block: what the pass runs through.
            names: layers of it, in the order in which the pass reaches them.

        Returns:
            layer name -> [tokens, cols], what it reads.
        """
        inputs: dict[str, Tensor] = {}
        with recorded(block, names, inputs, stop=True):
            self._greenlet.switch()
        return inputs

    def finish(self) -> Tensor:
        """Go on to the end; what leaves the block."""
        hidden: Tensor = self._greenlet.switch()
        return hidden


@contextmanager
def recorded(
    block: nn.Module, names: Sequence[str], inputs: dict[str, Tensor], *, stop: bool = False
) -> Iterator[None]:
    """Keep what the named layers read while the block runs, [tokens, cols] each.

    Args:
        block: where the layers are.
        names: the layers, in the order in which a pass reaches them.
        inputs: where to keep it.
        stop: let the pass wait at the last of them.
    """

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs[name] = arguments[0].reshape(-1, arguments[0].shape[-1])
            if stop and name == names[-1]:
                from greenlet import getcurrent

                getcurrent().parent.switch()

        return hook

    handles = [entrance(block, name).register_forward_pre_hook(keep(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

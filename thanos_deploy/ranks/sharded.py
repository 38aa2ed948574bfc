"""A model whose blocks are sharded over the ranks: each rank keeps some rows of every weight.

This is PyTorch's FSDP2: the weights of a block are gathered for its forward and backward pass, and
the gradients of each row go to the rank that has the row. Only the sum of the gradients differs:
they are added in the order of the numbered parts of a step, so that the sum does not depend on the
number of ranks. A process by itself has the whole model, and adds in the same order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from thanos_deploy.ranks.group import current


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """This rank's part of a tensor.

    Attributes:
        tensor: the whole tensor, or this rank's rows of it.
        rows_of: name of the weight whose rows correspond to the tensor's and are sharded in the
            same way; None if every rank has the whole tensor.
    """

    tensor: Tensor
    rows_of: str | None = None


class Sharded:
    """A model that is trained by several ranks, each on some numbered parts of every step.

    Attributes:
        model: the model; its blocks are sharded, and everything else is on every rank.
    """

    def __init__(self, model: PreTrainedModel, blocks: Sequence[nn.Module]) -> None:
        """Shard the blocks.

        Args:
            model: the whole model, the same on every rank.
            blocks: its blocks; only weights in them may have gradients.
        """
        self.model = model
        self._sums: list[_InOrder] = []
        if current().size == 1:
            return
        for block in blocks:
            # Each block is called by the model directly; none is nested in another one.
            shared = fully_shard(block, reshard_after_forward=True)
            assert isinstance(shared, FSDPModule)
            self._sums.append(_InOrder())
            shared.set_custom_reduce_scatter(self._sums[-1])
            shared.set_gradient_divide_factor(1.0)
            shared.set_force_sum_reduction_for_comms(True)

    def turns(self, parts: int) -> Iterator[int | None]:
        """Yield this rank's part for each turn of a step; None if it has no part in that turn.

        In every turn every rank must run a backward pass, of any data if it has no part, because
        all ranks are needed to gather the blocks.

        Args:
            parts: number of parts of the step.
        """
        ranks = current()
        for turn in range(ranks.turns(parts)):
            first = turn * ranks.size
            for sums in self._sums:
                sums.begin(turn == 0, min(ranks.size, parts - first))
            if self._sums and turn:
                self.forget_gradients()  # they are in the sums
            yield first + ranks.rank if first + ranks.rank < parts else None

    def own(self, name: str) -> Tensor:
        """Return this rank's rows of a weight; changing them in place changes the weight."""
        return _here(self.model.get_parameter(name).detach())

    def put(self, name: str, weight: Tensor) -> None:
        """Set the values of a weight; each rank stores its own rows.

        Args:
            name: name of the weight.
            weight: the whole new weight, the same on every rank, in the dtype of the old one.
        """
        self.own(name).copy_(self.rows(weight, name))

    def rows(self, tensor: Tensor, name: str) -> Tensor:
        """Return this rank's rows of a whole tensor that is the same on every rank.

        Args:
            tensor: the whole tensor, with a row for each row of the weight.
            name: name of the weight.
        """
        weight = self.model.get_parameter(name)
        if not isinstance(weight, DTensor):
            return tensor
        return distribute_tensor(
            tensor.contiguous(), weight.device_mesh, weight.placements, src_data_rank=None
        ).to_local()

    def gradient(self, name: str) -> Tensor:
        """Return this rank's rows of a weight's summed gradient, which may be changed in place."""
        gradient = self.model.get_parameter(name).grad
        assert gradient is not None
        return _here(gradient)

    def forget_gradients(self) -> None:
        """Clear all gradients."""
        self.model.zero_grad()

    def shape(self, part: Part) -> tuple[int, ...]:
        """Return the shape of the whole tensor of a part."""
        if part.rows_of is None:
            return tuple(part.tensor.shape)
        return (len(self.model.get_parameter(part.rows_of)), *part.tensor.shape[1:])

    def gathered(self, part: Part) -> Tensor:
        """Return the whole tensor of a part; called by all ranks."""
        return part.tensor if part.rows_of is None else self.whole(part.tensor, part.rows_of)

    def fill(self, part: Part, whole: Tensor) -> None:
        """Copy this rank's rows of a tensor into its part, in place.

        Args:
            part: this rank's part.
            whole: the whole tensor, the same on every rank.
        """
        rows = whole if part.rows_of is None else self.rows(whole, part.rows_of)
        part.tensor.copy_(rows)

    def whole(self, rows: Tensor, name: str) -> Tensor:
        """All-gather a tensor that is sharded like a weight, by rows.

        Args:
            rows: [rows of this rank, ...], this rank's part.
            name: name of the weight.
        """
        weight = self.model.get_parameter(name)
        if not isinstance(weight, DTensor):
            return rows
        shape = torch.Size(self.shape(Part(rows, name)))
        parts = DTensor.from_local(
            rows.contiguous(),
            weight.device_mesh,
            weight.placements,
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )
        return parts.full_tensor()


def _here(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class _InOrder(ReduceScatter):
    """Sums the gradients of one block in a fixed order, in place of FSDP2's reduce-scatter."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._present = 0

    def begin(self, first: bool, present: int) -> None:
        """Begin a turn.

        Args:
            first: whether it is the first turn of a step.
            present: number of ranks that have a part in it; these are the first ranks.
        """
        self._present = present
        if first:
            self._sum = None

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Allocate a buffer for the reduction."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> None:
        """Add this turn's parts to the step's sum, and output this rank's run of it."""
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        for part in received.reshape(group.size(), -1)[: self._present]:
            self._sum = part.clone() if self._sum is None else self._sum.add_(part)
        assert self._sum is not None
        output_tensor.copy_(self._sum)

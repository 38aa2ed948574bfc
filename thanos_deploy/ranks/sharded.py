"""A model whose blocks several ranks share: each keeps a part of the rows of every weight.

That is PyTorch's FSDP2: a block is put together when data passes it, forward and backward, and what
a rank has learned of it goes to whoever has the rows. Only how gradients are added up differs: in
the order of the numbered parts of a step, so that their sum does not depend on the number of ranks.
A process by itself has the whole model, and adds in the same order.
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
    """What a rank has of a tensor.

    Attributes:
        tensor: all of it, or this rank's rows.
        rows_of: the weight that has a row for each of its rows and is shared as it is; None where
            every rank has all of it.
    """

    tensor: Tensor
    rows_of: str | None = None


class Sharded:
    """A model that is trained on numbered parts of data.

    Attributes:
        model: it; its blocks are shared, and each rank has the rest.
    """

    def __init__(self, model: PreTrainedModel, blocks: Sequence[nn.Module]) -> None:
        """Share the blocks.

        Args:
            model: whole, and the same on every rank.
            blocks: of it; only weights in them may have gradients.
        """
        self.model = model
        self._sums: list[_InOrder] = []
        if current().size == 1:
            return
        for block in blocks:
            # Each is called by the model itself, so none is within another one.
            shared = fully_shard(block, reshard_after_forward=True)
            assert isinstance(shared, FSDPModule)
            self._sums.append(_InOrder())
            shared.set_custom_reduce_scatter(self._sums[-1])
            shared.set_gradient_divide_factor(1.0)
            shared.set_force_sum_reduction_for_comms(True)

    def turns(self, parts: int) -> Iterator[int | None]:
        """The part that this rank is to go back through next; None if there is none for it.

        Every rank goes back through something in every turn, as all of them are needed to put the
        blocks together.

        Args:
            parts: of a step.
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
        """This rank's rows of a weight, which may be changed in place."""
        return _here(self.model.get_parameter(name).detach())

    def put(self, name: str, weight: Tensor) -> None:
        """Give a weight other values, which every rank has; each keeps its rows.

        Args:
            name: of the weight.
            weight: all of it, in the dtype that it has.
        """
        self.own(name).copy_(self.rows(weight, name))

    def rows(self, tensor: Tensor, name: str) -> Tensor:
        """This rank's rows of a tensor of a weight's shape, which every rank has."""
        weight = self.model.get_parameter(name)
        if not isinstance(weight, DTensor):
            return tensor
        return distribute_tensor(
            tensor.contiguous(), weight.device_mesh, weight.placements, src_data_rank=None
        ).to_local()

    def gradient(self, name: str) -> Tensor:
        """This rank's rows of the sum of a weight's gradients, which may be changed in place."""
        gradient = self.model.get_parameter(name).grad
        assert gradient is not None
        return _here(gradient)

    def forget_gradients(self) -> None:
        """Begin anew."""
        self.model.zero_grad()

    def shape(self, part: Part) -> tuple[int, ...]:
        """Of the whole tensor."""
        if part.rows_of is None:
            return tuple(part.tensor.shape)
        return (len(self.model.get_parameter(part.rows_of)), *part.tensor.shape[1:])

    def gathered(self, part: Part) -> Tensor:
        """The whole tensor; called by all ranks."""
        return part.tensor if part.rows_of is None else self.whole(part.tensor, part.rows_of)

    def fill(self, part: Part, whole: Tensor) -> None:
        """Make a part one of another tensor, in place.

        Args:
            part: this rank's.
            whole: the tensor, which every rank has.
        """
        rows = whole if part.rows_of is None else self.rows(whole, part.rows_of)
        part.tensor.copy_(rows)

    def whole(self, rows: Tensor, name: str) -> Tensor:
        """What all ranks have of something that has a row for each row of a weight.

        Args:
            rows: [rows of this rank, ...].
            name: of the weight.
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
    """Adds up the gradients of one block, for FSDP2 in place of the library's reduction."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._present = 0

    def begin(self, first: bool, present: int) -> None:
        """Begin a turn.

        Args:
            first: of a step.
            present: ranks that have a part in it, the first ones.
        """
        self._present = present
        if first:
            self._sum = None

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Memory for a reduction."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> None:
        """Give this rank its run of the sum of all parts so far."""
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        for part in received.reshape(group.size(), -1)[: self._present]:
            self._sum = part.clone() if self._sum is None else self._sum.add_(part)
        assert self._sum is not None
        output_tensor.copy_(self._sum)

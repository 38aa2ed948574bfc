"""One piece of work done by several processes, which torchrun starts and calls ranks.

    shards   which calibration segments are summed together: the same for every number of ranks
    spread   which rank solves what
    group    what ranks tell each other
    sums     sums whose last bit does not depend on the number of ranks
    start    meeting the other ranks, or not at all
    watch    noticing that a rank has ended
    launch   starting ranks on this machine

The result of a piece of work does not depend on the number of ranks. Two rules see to that. What is
computed as one product is always of the same size: a batch of segments, a piece of the rows of a
layer, some sequences of a step; a rank has some of these, and never a part of one. And what is
added up is added in one fixed order, by shards, whoever computed it.

Everything else is as PyTorch has it: `torch.distributed` with gloo between processors and NCCL
between GPUs.
"""

"""Work in several processes, the ranks of torchrun, with results that do not depend on how many.

    shards   which calibration segments are summed together: the same for every number of ranks
    schedule which rank solves which rows of which layer
    group    the ranks, and collective communication between them
    sums     sums whose last bit does not depend on the number of ranks
    sharded  a model whose weights are sharded by FSDP2, with gradients summed in a fixed order
    start    connecting to the other ranks, if there are any
    watch    detecting that another rank has ended
    launch   starting ranks on this machine

Two rules make results independent of the number of ranks. First, the units of computation always
have the same size: a batch of segments, a piece of a layer's rows, some sequences of a step. A rank
gets whole units, never a part of one. Second, sums are added in one fixed order, whichever rank
computed a term.

Everything else is plain `torch.distributed`: gloo between CPUs, and NCCL between GPUs.
"""

"""The mathematics of one linear layer: Hessians, masks, triangular factors, elimination.

Pure functions of tensors for `methods`, `prune` and `shrink`. Nothing here knows a model, a file or
the command line.
"""

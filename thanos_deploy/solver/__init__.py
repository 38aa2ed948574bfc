"""The mathematics of one linear layer: Hessians, masks, triangular factors, elimination.

Pure functions of tensors for `methods`, `pruning` and `shrink`. Nothing here knows a model, a file
or the command line.
"""

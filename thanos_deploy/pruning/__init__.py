"""Prune a whole model by setting weights to zero, layer by layer; then tune, train and quantise it.

`thanos_deploy.stages` and the benchmarks call this package. Removed weights stay as zeros;
`thanos_deploy.shrink` makes matrices smaller.
"""

"""Pruning a whole model to zeros: recipe, layer by layer, tuning, recovery.

`thanos_deploy.stages` calls it, and so do the benchmarks. What is removed stays as zeros;
`thanos_deploy.shrink` is what makes matrices smaller.
"""

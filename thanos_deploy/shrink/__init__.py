"""Structured pruning: how wide each block becomes, and cutting heads and channels out.

`thanos_deploy.stages` calls it. The result is an ordinary smaller model.
"""

"""Structured pruning: how wide each block becomes, and cutting heads and channels out.

`thanos_deploy.stages` calls it. `survey` finds what every block would lose, `sizing` chooses the
widths, and `cut` makes the model, which is an ordinary smaller one.
"""

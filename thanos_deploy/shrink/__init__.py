"""Structured pruning: choose the widths of each block, and cut heads and channels out.

`thanos_deploy.stages` calls it. `survey` measures what every block would lose at which widths,
`sizing` chooses the widths, and `cut` makes the smaller model, which is an ordinary one.
"""

"""Calibration: texts, segments, and the walk of their activations through the blocks of a model.

`prune` and `shrink` walk with it, evaluation and export take their segments from it. One block of
the model is in memory at a time.
"""

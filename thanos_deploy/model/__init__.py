"""Language models on disk: families, weights, tokenizers, shapes, and the pattern of each layer.

All other packages read and write models through this package only. No code that comes with a model
is ever run, and no pickle is read.
"""

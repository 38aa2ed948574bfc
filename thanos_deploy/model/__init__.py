"""Language models on disk: families, weights, tokenizers, shapes, and the pattern of each layer.

Everything above reads and writes models through this package and through nothing else. No code
that comes with a model is ever run, and no pickle is read.
"""

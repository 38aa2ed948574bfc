"""ONNX: one graph for prefill and decode, its dtypes, and the check that it agrees with PyTorch.

`graph.export` is the entry point; the other files are its steps. Every other target with a graph
starts from the files that it writes.
"""

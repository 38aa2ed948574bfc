"""ONNX: one graph for prefill and decode, its types, and the proof that it agrees with PyTorch.

`graph.export` is what others call; the other files are its steps. Every other target with a graph
starts from its result.
"""

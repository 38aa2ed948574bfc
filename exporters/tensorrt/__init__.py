"""TensorRT and TensorRT-RTX: engines of the ONNX graph, and the proof of which layers run sparse.

`engine.export` is the entry point; the other files are its steps. The builder runs in a subprocess.
"""

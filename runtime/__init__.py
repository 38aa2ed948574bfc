"""Run exported models: numpy and one backend, without torch, transformers or onnx."""

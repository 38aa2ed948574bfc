"""NVIDIA GPUs: which are there, what they do while they work, and what was measured on them.

Anybody may call it. It needs no PyTorch and no GPU; `thanos_deploy.gpu_check` is what measures.
"""

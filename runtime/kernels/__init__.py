"""Kernels that multiply with 2:4 weights on an NVIDIA GPU; `blockwise` runs on a CPU.

The engine torch, the plugin for vLLM, `gpu_check` and the benchmarks use them through `operator`,
the PyTorch operator that calls them; `linears`, which puts them into a model; `choice`, which finds
the fastest, with `kernel_times`, which keeps what it has found; or `timing`, which measures them.
"""

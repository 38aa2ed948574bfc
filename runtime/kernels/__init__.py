"""Products with 2:4 weights on an NVIDIA GPU, one kernel a file.

The engine torch, the plugin for vLLM, `gpu_check` and the benchmarks call them: through `linears`,
which puts them into a model, `choice`, which finds the fastest, or `timing`, which measures them.
`blockwise` is the one for a CPU.
"""

"""Run a causal model on tensors at fixed addresses, so that a GPU can replay whole steps.

A decode step of a large model consists of some hundreds of short kernels. Launching them one by one
takes the host longer than the GPU needs to run them. If no tensor ever moves, the step can be
recorded once as a CUDA graph, and then launched with one call.
"""

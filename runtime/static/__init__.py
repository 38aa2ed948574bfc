"""Running a causal model in memory that does not move, so that a GPU can replay whole steps.

A decode step of a large model is some hundreds of short kernels, and starting them one by one takes
the host longer than the GPU needs to run them. Where every tensor has a fixed place, the step is
recorded into a CUDA graph once and started with one call.
"""

"""Model repositories for the Triton Inference Server and KServe.

`repository.export` is what others call.
"""

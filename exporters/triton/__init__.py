"""Model repositories for the Triton Inference Server and KServe.

`repository.export` is what others call; `kserve` is the manifest that it writes beside the
repository. Neither needs Triton or a GPU.
"""

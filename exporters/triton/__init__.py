"""Model repositories for the Triton Inference Server and KServe.

`repository.export` is the entry point; `kserve` writes the manifest in the repository. Neither
needs Triton or a GPU.
"""

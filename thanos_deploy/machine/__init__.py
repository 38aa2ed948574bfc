"""The machine that this process runs on: processor, memory, devices, how still it is.

Anybody may call it. It imports neither transformers nor anything of a model; `environment` is part
of a server image and imports nothing but the standard library.
"""

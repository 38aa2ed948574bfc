"""The machine that this process runs on: processor, memory, devices, and how undisturbed it is.

Every other package may import this one. It imports neither transformers nor any code about models.
`environment` is part of a server image and needs only the standard library.
"""

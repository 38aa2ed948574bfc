"""Run exported models: engines, text generation, continuous batching, and the server.

Any other package may import this one: `thanos_deploy` measures with it. A server image contains
only this package, `bundle`, `machine.environment` and a few other light modules. It needs numpy and
one backend; only the torch backend needs PyTorch.
"""

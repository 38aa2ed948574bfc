"""Run exported models: engines, generating text, batching requests, and the server.

Anybody may call it: `thanos_deploy` measures with it, and a server image holds nothing else but
`bundle`, `machine.environment` and a few more light modules. It needs numpy and one backend; only
the backend torch needs PyTorch.
"""

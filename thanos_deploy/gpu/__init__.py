"""NVIDIA GPUs: those of this machine, their state during a run, and records of measurements.

Every package may import it. It needs neither PyTorch nor a GPU. The measurements themselves are
made by `thanos_deploy.gpu_check`.
"""

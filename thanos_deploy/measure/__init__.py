"""Measuring: perplexity, tasks, latency, memory, and the statistics that make figures comparable.

`thanos_deploy.stages` and the benchmarks call it. It runs models through `runtime` and knows
nothing of how they were pruned or exported.
"""

"""Measure models: perplexity, tasks, latency and memory, with statistics to compare them.

`thanos_deploy.stages` and the benchmarks call it. It runs exported models through `runtime`, and
does not depend on how they were pruned or exported.
"""

"""Forecast the speed and the cost of pruning on hardware that is not present, from model sizes.

`thanos-deploy plan` and the dry runs call it. A forecast is not a measurement. Where a figure was
measured on the GPU in question, it replaces the forecast.
"""

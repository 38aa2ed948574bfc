"""What a pattern will bring and cost on hardware that is not here, computed from sizes.

`thanos-deploy plan` and the dry runs call it. Nothing here is a measurement; what was measured on
GPUs replaces a forecast where there is such a figure.
"""

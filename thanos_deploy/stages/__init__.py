"""The stages of a bundle, one per file; `thanos_deploy.stages.pipeline` runs all of them in order.

`thanos_deploy.api` calls the stages, and the command line calls the API. Each stage takes a request
with the options of the user, and has a result, which the manifest of the bundle records. The work
itself is done by other packages, such as `thanos_deploy.pruning`.
"""

"""The stages of a bundle, one per file; `thanos_deploy.stages.pipeline` puts them in a row.

`thanos_deploy.api` calls them, and through it the command line does. A stage has a request, which
says what is asked for, and a result, which the manifest of the bundle keeps; the packages below do
the work itself.
"""

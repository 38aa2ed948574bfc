"""The stages of a bundle, one per file; `thanos_deploy.stages.pipeline` puts them in a row."""

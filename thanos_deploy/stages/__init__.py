"""The stages of a bundle, one per file; `thanos_deploy.pipeline` puts them in a row."""

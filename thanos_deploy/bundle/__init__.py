"""The bundle, which is the output folder: its manifest, its files, and the names in them.

Stages write through `manifest.Bundle`; all other code only reads. This package knows nothing of
models and imports nothing but the standard library, so that a server image can include it alone.
"""

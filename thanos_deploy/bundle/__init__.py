"""The bundle, the one output folder: its manifest, its files, and the names in them.

Stages write through `manifest.Bundle` and everybody else reads. It knows nothing of models and
imports nothing but the standard library, so that a server image can hold it.
"""

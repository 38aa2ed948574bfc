"""Take a language model, give back a deployable sparse one, with proof.

This package is imported by every other one, the light runtime included, so importing it
must cost nothing: the version and no more.
"""

__version__ = "0.1.0"

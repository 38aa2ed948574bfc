"""Modules that the fork server imports once, so that no step has to import them again.

Importing them does not touch the GPU.
"""

import torch  # noqa: F401
import transformers  # noqa: F401
from transformers import LlamaForCausalLM  # noqa: F401

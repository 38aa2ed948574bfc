"""What steps are forked with: imported once, so that none of them pays for it again.

Importing these touches no GPU.
"""

import torch  # noqa: F401
import transformers  # noqa: F401
from transformers import LlamaForCausalLM  # noqa: F401

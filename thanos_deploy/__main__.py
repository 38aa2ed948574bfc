"""Entry point of `python -m thanos_deploy`, which is how torchrun starts the command."""

import os

from thanos_deploy.cli import main

# PyTorch prints C++ stack traces when the connection to a rank that has ended breaks. The remaining
# ranks report which rank that was and what to do. PyTorch reads this variable when it is imported.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

main()

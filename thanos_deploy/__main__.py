"""`python -m thanos_deploy`, which is how torchrun starts the command."""

import os

from thanos_deploy.cli import main

# PyTorch prints C++ stacks where the connection to a rank that has ended breaks; which rank that
# was and what to do is said by the ranks that are left. It reads this when it is imported.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

main()

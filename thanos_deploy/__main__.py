"""`python -m thanos_deploy`, which is how torchrun starts the command."""

from thanos_deploy.cli import main

main()

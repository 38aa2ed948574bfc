"""Run one command in several processes."""

import sys

import click

from thanos_deploy.errors import UsageError

processes_option = click.option(
    "--processes",
    type=click.IntRange(min=1),
    help="Number of processes that prune together on this machine: one for each GPU, or on "
    "CPUs with an equal share of the cores each. The number does not change the result, "
    "as long as each process has the same number of threads. For several machines, start "
    "the command with torchrun.  [default: 1]",
)


def run_in_processes(processes: int | None) -> None:
    """Run this command in several processes, unless this process is already one of them.

    Args:
        processes: number of processes; None if the user did not give one.

    Raises:
        click.exceptions.Exit: the processes that were started have ended; with their exit code.
        UsageError: torchrun has started another number of processes.
        DeployError: see `launch.launch`.
    """
    from thanos_deploy.ranks.start import place

    found = place()
    if found is not None:
        if processes not in (None, found.size):
            raise UsageError(
                f"--processes {processes}, but the number of processes that torchrun has "
                f"started is {found.size}",
                fix="leave --processes out where torchrun starts the processes",
            )
    elif processes is not None and processes > 1:
        import torch

        from thanos_deploy.ranks.launch import launch

        raise click.exceptions.Exit(launch(sys.argv[1:], processes, torch.get_num_threads()))


def may_print() -> bool:
    """Whether this process may print: it is the only one, or the first of several."""
    from thanos_deploy.ranks.start import is_follower

    return not is_follower()

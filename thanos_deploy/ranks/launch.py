"""Start ranks on this machine with PyTorch's elastic launcher, which `torchrun` uses as well."""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from thanos_deploy.errors import PlatformError, ResourceError
from thanos_deploy.ranks.start import ALL_THREADS

# Loggers of the launcher. They repeat the error that a failed worker has reported itself.
_LOGGERS = "torch.distributed.elastic"


def launch(arguments: Sequence[str], processes: int, threads: int) -> int:
    """Run a command of `thanos-deploy` in several processes.

    Args:
        arguments: the command-line arguments of `thanos-deploy`.
        processes: number of processes.
        threads: number of PyTorch threads in this process, to be divided among the processes.

    Returns:
        the exit code of the command.

    Raises:
        ResourceError: a process was killed by SIGKILL, and no other rank has reported it.
        PlatformError: PyTorch was built without `torch.distributed`.
        KeyboardInterrupt: this process was ended by a signal that the launcher handles.
    """
    import torch.distributed as dist

    if not dist.is_available():
        raise PlatformError(
            "this build of PyTorch has no torch.distributed",
            fix="use --processes 1, or a build of PyTorch that has torch.distributed",
        )
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger(_LOGGERS).setLevel(logging.CRITICAL)
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ[ALL_THREADS] = str(threads)
    os.environ["OMP_NUM_THREADS"] = str(max(1, threads // processes))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=f"thanos-deploy-{os.getpid()}",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "thanos_deploy", *arguments)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        killed = [rank for rank, code in codes.items() if code == -signal.SIGKILL]
        if not killed:
            # Ranks that end because of a failed one take over its exit code.
            return next((code for code in codes.values() if code > 0), 1)
        if ResourceError.exit_code not in codes.values():  # no rank has reported it
            raise ResourceError(
                f"rank {killed[0]} of {processes} was killed by SIGKILL",
                fix="repeat the command: finished work is kept. If the system killed it for "
                "lack of memory, use fewer processes",
            ) from error
        return ResourceError.exit_code
    except SignalException as error:
        raise KeyboardInterrupt from error
    return 0

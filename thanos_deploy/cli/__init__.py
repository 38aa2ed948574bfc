"""The command `thanos-deploy`: each subcommand parses its options, calls the API and prints.

Every module of this package that defines `command` is a subcommand; a new module is a new
subcommand. Modules whose names begin with an underscore are shared by the subcommands.

Results go to standard output, progress and errors to standard error. Heavy libraries are imported
by the subcommand that needs them, so that `--help` answers at once.
"""

import os
import select
import signal
import sys
import traceback
from importlib import import_module
from io import TextIOWrapper
from pkgutil import iter_modules

import click

from thanos_deploy import __version__
from thanos_deploy.cli import _progress
from thanos_deploy.errors import DeployError, translate_system_error

INTERRUPTED = 130

# The exit code that a shell shows for a command that SIGPIPE ended.
UNREAD = 141


class _UnreadError(Exception):
    """Standard output is a pipe whose reader has closed it, as `| head` does."""


class _Commands(click.Group):
    """The group of all subcommands."""

    def invoke(self, ctx: click.Context) -> object:
        """Run a subcommand and flush its output.

        A closed output pipe is raised as `_UnreadError`; click would exit with code 1.
        """
        try:
            done = super().invoke(ctx)
            if sys.stdout is not None:  # it is None after `>&-`
                sys.stdout.flush()
        except BrokenPipeError as error:
            if not _is_read(sys.stdout.fileno()):
                raise _UnreadError from error
            raise  # from another pipe
        return done


def _is_read(descriptor: int) -> bool:
    """Whether a file descriptor still has a reader; only a pipe can lose its reader."""
    watched = select.poll()
    watched.register(descriptor, 0)
    return not any(event & select.POLLERR for _, event in watched.poll(0))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Prune a language model, export it, and measure its quality, speed and size.

    MODEL is a hub id, a local Hugging Face folder, a packed folder, a bundle, a .gguf file, or a
    .safetensors file beside its config.json. OUT is a bundle: the folder that `prune` or
    `prune-export` makes. Repeat a command that was interrupted, and it continues; finished work is
    not done again.

    Exit codes: 0 ok, 1 a bug, 2 usage, 3 bad input, 4 the machine lacks something, 5 no memory or
    disk, 6 a gate failed, 7 a file was changed, 130 interrupted, 141 the output pipe was closed.
    """


for _module in iter_modules(__path__):
    if not _module.name.startswith("_"):
        cli.add_command(import_module(f"{__name__}.{_module.name}").command)


def main() -> None:
    """Run the command and turn every outcome into its exit code."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # escape characters that its encoding lacks
            stream.reconfigure(errors="backslashreplace")
    sys.exit(_run())


def _run() -> int:
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except DeployError as error:
        return _fail(error)
    except _UnreadError:
        # Otherwise the interpreter would report an error when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except (KeyboardInterrupt, click.Abort):
        _progress.show_error("interrupted; repeat the command to continue where it stopped")
        return INTERRUPTED
    except Exception as error:
        if known := translate_system_error(error):
            return _fail(known)
        traceback.print_exc()
        _progress.show_error("this is a bug in thanos-deploy; please report the lines above")
        return 1
    return 0


def _fail(error: DeployError) -> int:
    _progress.show_error(str(error))
    return error.exit_code


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt

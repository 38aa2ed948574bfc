"""The file with the times of kernels on a GPU, and with the kernels that were chosen by them.

The file is kept beside a bundle's engines, so that the next start on the same GPU, with the same
versions, measures nothing.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.kernels import choice
from runtime.kernels.choice import DENSE, Row, Shape, bits
from thanos_deploy import __version__
from thanos_deploy.bundle import files
from thanos_deploy.bundle.codec import decode_format, encode, loads
from thanos_deploy.machine import environment

logger = logging.getLogger(__name__)

FORMAT = "thanos-deploy/kernels/1"
FILE = "kernels.json"


@dataclass(frozen=True, slots=True)
class Origin:
    """GPU and versions for which a measurement is valid.

    Attributes:
        card: name of the GPU.
        torch, triton, tool: versions; triton is None where it is not installed.
    """

    card: str
    torch: str
    triton: str | None
    tool: str

    @classmethod
    def here(cls) -> "Origin":
        """Return the current GPU and the installed versions."""
        libraries = environment.describe().libraries
        return cls(
            torch.cuda.get_device_name(), torch.__version__, libraries.get("triton"), __version__
        )


@dataclass(frozen=True, slots=True)
class _Table:
    """The content of the file: measurements, and the GPU and versions that they are valid for."""

    format: str
    origin: Origin
    rows: tuple[Row, ...]


def read(path: Path, origin: Origin) -> tuple[Row, ...]:
    """Read the rows of a file that was measured on the same GPU with the same versions.

    A file of another origin, or one that cannot be read, is no error, because everything can be
    measured again: the result is empty and a warning is logged.
    """
    try:
        table = decode_format(_Table, loads(path.read_bytes()), FORMAT)
        _require_known(table.rows)
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        logger.warning(
            "%s: the kernels are measured again, because this file is not readable (%s)",
            path,
            error,
        )
        return ()
    if table.origin != origin:
        logger.warning(
            "%s: the kernels are measured again, because this file is for %s; this is %s",
            path,
            table.origin,
            origin,
        )
        return ()
    return table.rows


def write(path: Path, origin: Origin, rows: Sequence[Row]) -> None:
    """Write rows to a file, for `read`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace_json(path, encode(_Table(FORMAT, origin, tuple(rows))))


def _require_known(rows: Sequence[Row]) -> None:
    """Refuse rows that choose a kernel that was not timed or no longer exists.

    Raises:
        ValueError: there is such a row, or one with another number of buckets.
    """
    for row in rows:
        known = {one.kernel for one in row.timed} & choice.makers().keys()
        if len(row.chosen) != len(choice.TOKENS) or not known.issuperset(row.chosen):
            raise ValueError(f"{row.chosen} chosen for {row.shape}")


def folder(keep: Path | None, architecture: str) -> Path:
    """Return the folder for the file of measurements.

    Args:
        keep: the folder of a bundle's engines; None if there is no bundle.
        architecture: architecture of the GPU, such as "sm90".

    Returns:
        A folder in `keep`, or in the cache folder of thanos-deploy if there is no bundle or it
        cannot be written to.
    """
    if keep is None or not os.access(keep if keep.exists() else keep.parent, os.W_OK):
        keep = environment.cache_folder()
    return keep / f"torch-{architecture}"


def rows_here(shapes: Sequence[Shape], device: torch.device, keep: Path | None) -> dict[Shape, Row]:
    """Return the rows for some shapes on this GPU; see `rows_for` and `folder`.

    Args:
        shapes: shapes of all layers, repeated for every layer.
        device: the GPU.
        keep: the folder of a bundle's engines; None if there is no bundle.
    """
    capability = torch.cuda.get_device_capability(device)
    return rows_for(
        shapes,
        folder(keep, "sm{}{}".format(*capability)) / FILE,
        Origin.here(),
        lambda missing: choice.measure(
            missing, choice.replayed, candidates=choice.makers(), device=str(device)
        ),
    )


def rows_for(
    shapes: Sequence[Shape],
    path: Path,
    origin: Origin,
    measured: Callable[[Sequence[Shape]], tuple[Row, ...]],
) -> dict[Shape, Row]:
    """Return the rows for some shapes: from a file, and measured if the file lacks them.

    The memory that the layers will take is logged.

    Args:
        shapes: shapes of all layers, repeated for every layer.
        path: the file; it has all rows afterwards.
        origin: this GPU and these versions.
        measured: measures the shapes that are missing.
    """
    rows = {row.shape: row for row in read(path, origin)}
    missing = [shape for shape in dict.fromkeys(shapes) if shape not in rows]
    if missing:
        logger.warning("measuring the kernels for %d shapes of layers: %s", len(missing), path)
        rows |= {row.shape: row for row in measured(missing)}
        write(path, origin, list(rows.values()))
    logger.info(
        "%s: the linear layers take %d bytes of memory; dense layers would take %d",
        path,
        sum(shape.outputs * shape.inputs * bits(rows[shape].chosen) // 8 for shape in shapes),
        sum(shape.outputs * shape.inputs * bits([DENSE]) // 8 for shape in shapes),
    )
    return rows

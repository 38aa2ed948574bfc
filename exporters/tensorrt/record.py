"""Reading build.json."""

import json
from pathlib import Path

from thanos_deploy.bundle.codec import decode
from thanos_deploy.bundle.engine_record import BuildRecord
from thanos_deploy.bundle.layout import BUILD, BUILD_FORMAT
from thanos_deploy.errors import InputError


def read_build(folder: Path) -> BuildRecord:
    """The content of build.json.

    Raises:
        InputError: it is missing or not readable.
    """
    path = folder / BUILD
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != BUILD_FORMAT:
            raise ValueError(f"format {content['format']!r}")
        return decode(BuildRecord, content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not a readable record of a build ({type(error).__name__}: {error})",
            fix="build the engine again with --overwrite",
        ) from error

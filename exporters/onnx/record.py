"""Reading export.json."""

import json
from pathlib import Path

from thanos_deploy.bundle.codec import decode
from thanos_deploy.bundle.graph_record import GraphRecord
from thanos_deploy.errors import InputError


def read_record(path: Path) -> GraphRecord:
    """The content of an export.json.

    Raises:
        InputError: it is missing or not readable.
    """
    try:
        content = json.loads(path.read_bytes())
        for weight in content["weights"]:
            # Weights had no pattern of their own while all had the same.
            weight.setdefault("pattern", content["pattern"])
        return decode(GraphRecord, content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not readable ({error})", fix="export again with --target onnx --overwrite"
        ) from error

"""Write an InferenceService for KServe that serves a Triton model repository.

KServe's own runtime for Triton starts the server on the folder that `storageUri` names; of its
models only `text` is loaded, so that an engine for another GPU is no reason to be not ready.
"""

import re
from pathlib import Path

import yaml

from thanos_deploy import __version__

_NAME_LENGTH = 40  # KServe makes longer names of it, and a host name's part has at most 63


def write(path: Path, *, name: str, model: str, memory_bytes: int) -> None:
    """Write the InferenceService.

    Args:
        path: the file.
        name: what the service is called after.
        model: the one that is loaded.
        memory_bytes: what the server needs.
    """
    label = service_name(name)
    memory = f"{-(-memory_bytes // 2**20)}Mi"
    service = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": label},
        "spec": {
            "predictor": {
                "model": {
                    "modelFormat": {"name": "triton", "version": "2"},
                    "protocolVersion": "v2",
                    "storageUri": f"pvc://{label}/triton",
                    "image": f"{label}-triton:{__version__}",
                    "args": ["--model-control-mode=explicit", f"--load-model={model}"],
                    "resources": {"requests": {"memory": memory}, "limits": {"memory": memory}},
                }
            }
        },
    }
    path.write_text(yaml.safe_dump(service, sort_keys=False), encoding="utf-8")


def service_name(name: str) -> str:
    """A name that KServe takes: small letters, digits and hyphens, a letter first."""
    label = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    if not label[:1].isalpha():
        label = f"model-{label}"
    return label[:_NAME_LENGTH].rstrip("-")

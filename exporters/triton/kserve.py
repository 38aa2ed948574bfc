"""Write an InferenceService for KServe that serves a Triton model repository.

KServe's own runtime for Triton starts the server on the folder that `storageUri` names. Only the
model `text` is loaded, so an engine for another GPU cannot keep the server from getting ready.
"""

import re
from pathlib import Path

import yaml

from thanos_deploy import __version__

# KServe appends to the name, and a label of a host name has at most 63 characters.
_NAME_LENGTH = 40


def write(path: Path, *, name: str, model: str, memory_bytes: int) -> None:
    """Write the InferenceService.

    Args:
        path: the file to write.
        name: a name from which the name of the service is made; see `service_name`.
        model: the model of the repository that is loaded.
        memory_bytes: memory that the server needs; both the request and the limit.
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
    """Make a name that KServe takes: lower-case letters, digits and hyphens, a letter first."""
    label = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    if not label[:1].isalpha():
        label = f"model-{label}"
    return label[:_NAME_LENGTH].rstrip("-")

"""The InferenceService against the types of KServe's and Kubernetes' own Python clients.

Both are generated from the published OpenAPI schemas. They are read, not imported: their packages
need a cluster's worth of dependencies.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pages import blocks
from tests.triton.conftest import PACKAGES, needs_triton

pytestmark = needs_triton

MODELS = (PACKAGES / "kserve" / "models", PACKAGES / "kubernetes" / "client" / "models")
PLAIN = {"str": str, "int": int, "bool": bool, "float": float, "object": object}


def complaints(value: Any, kind: str, where: str = "") -> Iterator[str]:
    """What is wrong with a value of a type, as the clients call it."""
    if kind in PLAIN:
        if not isinstance(value, PLAIN[kind]):
            yield f"{where}: {value!r} is no {kind}"
    elif inner := re.fullmatch(r"list\[(.+)\]", kind):
        for index, entry in enumerate(value):
            yield from complaints(entry, inner[1], f"{where}[{index}]")
    elif inner := re.fullmatch(r"dict\(str, (.+)\)", kind):
        for name, entry in value.items():
            yield from complaints(entry, inner[1], f"{where}.{name}")
    else:
        yield from _complaints_of_model(value, kind, where)


def _complaints_of_model(value: Any, kind: str, where: str) -> Iterator[str]:
    file = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", kind).lower() + ".py"
    source = next(folder / file for folder in MODELS if (folder / file).exists()).read_text()
    tables = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id in ("openapi_types", "attribute_map")
    }
    names = {written: own for own, written in tables["attribute_map"].items()}
    for name, entry in value.items():
        if name not in names:
            yield f"{where}: {kind} has no {name}"
        else:
            yield from complaints(entry, tables["openapi_types"][names[name]], f"{where}.{name}")
    for name, own in names.items():
        if f"Invalid value for `{own}`, must not be `None`" in source and name not in value:
            yield f"{where}: {kind} needs {name}"


@pytest.fixture
def service(repository: Path) -> Any:
    return yaml.safe_load((repository / "kserve.yaml").read_text())


def test_the_inference_service_is_of_the_published_form(service: Any) -> None:
    assert (service["apiVersion"], service["kind"]) == (
        "serving.kserve.io/v1beta1",
        "InferenceService",
    )
    assert list(complaints(service, "V1beta1InferenceService")) == []
    # https://github.com/kserve/kserve, pkg/apis/serving/v1beta1/inference_service_validation.go
    assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", service["metadata"]["name"])
    # As KServe's runtime for Triton has it: config/runtimes/kserve-tritonserver.yaml there.
    model = service["spec"]["predictor"]["model"]
    assert model["modelFormat"] == {"name": "triton", "version": "2"}
    assert model["args"] == ["--model-control-mode=explicit", "--load-model=text"]


def test_the_service_of_the_page_on_vllm_is_of_the_published_form() -> None:
    (block,) = blocks("docs/vllm.md", "yaml")
    service = yaml.safe_load(block.text)
    assert (service["apiVersion"], service["kind"]) == (
        "serving.kserve.io/v1beta1",
        "InferenceService",
    )
    assert list(complaints(service, "V1beta1InferenceService")) == []


@pytest.mark.parametrize(
    ("path", "entry", "complaint"),
    [
        (("spec", "predictor", "model"), {"storageURI": "pvc://a"}, "has no storageURI"),
        (("spec", "predictor", "model"), {"args": [1]}, "1 is no str"),
        (("spec", "predictor", "model", "resources"), {"request": {}}, "has no request"),
        (("spec",), {"predictors": {}}, "has no predictors"),
    ],
)
def test_a_mistake_would_be_seen(
    service: Any, path: tuple[str, ...], entry: dict[str, Any], complaint: str
) -> None:
    place = service
    for name in path:
        place = place[name]
    place.update(entry)
    (found,) = complaints(service, "V1beta1InferenceService")
    assert complaint in found


def test_a_missing_part_would_be_seen(service: Any) -> None:
    del service["spec"]["predictor"]
    (found,) = complaints(service, "V1beta1InferenceService")
    assert "needs predictor" in found

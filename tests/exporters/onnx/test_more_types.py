"""The graph of each type that the other tests of graphs leave out, compared with PyTorch."""

from pathlib import Path

import pytest
import torch

import exporters.onnx.graph
from tests.byte_tokenizer import save_byte_tokenizer
from tests.conftest import EVERY_TYPE, MODEL_TYPES, MakeModel
from tests.model_types import MIXTURES
from tests.test_published import REPOSITORIES
from tests.thanos_deploy.model.test_experts import write_mixture
from thanos_deploy.errors import ModelError
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.families import family_of

# Exported by tests/test_published.py, which holds the same limit.
PUBLISHED = {str(its.config["model_type"]) for its in REPOSITORIES.values()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type", sorted({*EVERY_TYPE, *MIXTURES} - {*MODEL_TYPES} - PUBLISHED)
)
def test_a_graph_computes_what_the_model_does(
    make_model: MakeModel, tmp_path: Path, model_type: str
) -> None:
    if model_type in MIXTURES:
        folder = write_mixture(tmp_path / "model", family_of(model_type), MIXTURES[model_type])
        save_byte_tokenizer(folder)
    else:
        folder = make_model(model_type)
    (tmp_path / "onnx").mkdir()
    record = exporters.onnx.graph.export(Checkpoint.open(folder), tmp_path / "onnx", pattern=None)
    assert len(record.parity) >= 4
    assert {weight.name for weight in record.weights} == set(Checkpoint.open(folder).linears)


def test_what_the_exporter_cannot_follow_is_said(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("data-dependent\n\nand pages more")

    monkeypatch.setattr(torch.onnx, "export", fail)
    monkeypatch.setattr("exporters.onnx.trace._traced", {})
    with pytest.raises(
        ModelError, match=r"no ONNX graph can be made \(RuntimeError: data-dependent\)"
    ):
        exporters.onnx.graph.export(Checkpoint.open(tiny_llama), tmp_path, pattern=None)

"""The page that adds a family: what it shows runs, and the family works."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import stock_model
from tests.thanos_deploy.model.test_experts import MIXED, write_mixture
from thanos_deploy.model import families
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.loaders import judge
from thanos_deploy.shrink import sizing
from thanos_deploy.shrink.cut import shrink
from thanos_deploy.shrink.options import Fit, Sizing
from thanos_deploy.shrink.survey import survey

PAGE = Path(__file__).parents[3] / "docs" / "develop" / "add-a-family.md"
SEGMENTS = torch.randint(257, (4, 60), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the page defines; its models are in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(families, "FAMILIES", families.FAMILIES)  # which the page adds to
    names: dict[str, Any] = {}
    text = PAGE.read_text(encoding="utf-8")
    for found in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        exec(compile("\n" * text.count("\n", 0, found.start(1)) + found[1], PAGE, "exec"), names)
    return names


def test_the_family_of_the_page_is_pruned_shrunk_and_loaded_again(
    shown: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(tmp_path / "toy")
    assert checkpoint.family is shown["STARCODER2"]
    layers = [layer for block in shown["blocks"] for layer in block.layers]
    assert [layer.name for layer in layers] == list(checkpoint.linears)
    assert all(layer.pattern_holds and layer.solver == "thanos" for layer in layers)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("toy", "pruned"))
    for name in before.keys() - {f"{linear}.weight" for linear in checkpoint.linears}:
        assert torch.equal(before[name], after[name]), name
    assert (
        stock_model(tmp_path / "pruned").generate(SEGMENTS[:1, :3], max_new_tokens=3).shape[1] > 3
    )

    losses = survey(checkpoint, SEGMENTS)
    plan = sizing.plan(checkpoint, losses, 0.15, Sizing("ffn"))
    (tmp_path / "shrunk").mkdir()
    shrink(checkpoint, SEGMENTS, tmp_path / "shrunk", plan, Fit())
    assert stock_model(tmp_path / "shrunk").config.intermediate_size < 48


def test_programs_whose_source_was_not_read_are_not_judged(shown: dict[str, Any]) -> None:
    config = shown["config"].to_dict()
    assert {verdict.compatible for verdict in judge(config)} == {None}


def test_the_mixture_of_the_page_opens(
    shown: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = shown["QWEN3_MOE"]
    monkeypatch.setattr(families, "FAMILIES", (row,))
    checkpoint = Checkpoint.open(write_mixture(tmp_path / "mixture", row, MIXED))
    assert "model.layers.1.mlp.experts.3.down_proj" in checkpoint.linears
    assert PAGE.read_text(encoding="utf-8").count("mlp.experts.3.down_proj") == 1

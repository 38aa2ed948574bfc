from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import MODEL_TYPES, VOCABULARY, MakeModel, stock_model
from thanos_deploy import sizing
from thanos_deploy.checkpoint import Checkpoint, load_model
from thanos_deploy.linear import matrix
from thanos_deploy.shrink import BlockReport, shrink, survey
from thanos_deploy.sizing import Plan

SEGMENTS = torch.randint(VOCABULARY, (6, 100), generator=torch.Generator().manual_seed(0))


def run(
    folder: Path,
    out: Path,
    fraction: float = 0.3,
    *,
    part: str = "both",
    allocation: str = "uniform",
    dense_target: float = 0.0,
) -> tuple[Plan, list[BlockReport]]:
    out.mkdir()
    checkpoint = Checkpoint.open(folder)
    losses = survey(checkpoint, SEGMENTS)
    plan = sizing.plan(checkpoint, losses, fraction, part=part, allocation=allocation)
    reports = shrink(checkpoint, SEGMENTS, out, plan=plan, dense_target=dense_target)
    return plan, reports


def masked_model(dense: Path, shrunk: Path, reports: list[BlockReport]) -> Any:
    """The dense model with zero columns where the shrunk one has lost heads and channels.

    Nothing is cut: queries, keys, values and channels that no column reads are still computed.
    """
    model, cut = stock_model(dense, dtype=torch.float32), load_model(shrunk)
    checkpoint = Checkpoint.open(dense)
    family, size = checkpoint.family, checkpoint.head_size
    for index, report in enumerate(reports):
        whole, part = (m.get_submodule(f"{family.blocks}.{index}") for m in (model, cut))
        heads = torch.tensor(report.heads)[:, None] * size + torch.arange(size)
        for name, kept in (
            (family.heads.consumer, heads.flatten()),
            (family.channels.consumer, torch.tensor(report.channels)),
        ):
            target: Any = whole.get_submodule(name)
            source: Any = part.get_submodule(name)
            with torch.no_grad():
                matrix(target).zero_()
                matrix(target)[:, kept] = matrix(source)
                if target.bias is not None:
                    target.bias.copy_(source.bias)
    return model


@pytest.mark.parametrize("part", ["heads", "ffn", "both"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_cutting_changes_nothing_that_masking_has_not_changed(
    make_model: MakeModel, tmp_path: Path, model_type: str, part: str
) -> None:
    folder = make_model(model_type, tie_word_embeddings=True)
    fraction = 0.1 if part == "heads" else 0.2
    plan, reports = run(folder, tmp_path / "shrunk", fraction, part=part)
    assert plan.removed >= fraction
    masked = masked_model(folder, tmp_path / "shrunk", reports)
    shrunk = load_model(tmp_path / "shrunk")
    with torch.no_grad():
        expected, actual = (m(SEGMENTS).logits for m in (masked, shrunk))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    dense, small = (sum(p.numel() for p in m.parameters()) for m in (masked, shrunk))
    assert small < dense

"""Experts cut out, and channels of them: against the masked model, and REAP by its definition."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import stock_model
from tests.model_types import MIXTURES
from tests.thanos_deploy.model.test_experts import SEGMENTS, tensors_of, write_mixture
from thanos_deploy.bundle.codec import decode, encode
from thanos_deploy.errors import UsageError
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.families import family_of
from thanos_deploy.model.linear import matrix
from thanos_deploy.model.load import load_model
from thanos_deploy.shrink import experts, sizing
from thanos_deploy.shrink.cut import check, shrink
from thanos_deploy.shrink.options import Fit, Part, Sizing
from thanos_deploy.shrink.result import CutBlock
from thanos_deploy.shrink.sizing import Losses, Plan
from thanos_deploy.shrink.survey import survey

EXPERTS = 4

every_mixture = pytest.mark.parametrize("model_type", MIXTURES)


def dense(folder: Path, model_type: str) -> Path:
    return write_mixture(folder, family_of(model_type), MIXTURES[model_type])


def run(
    folder: Path, out: Path, fraction: float, part: Part, segments: torch.Tensor = SEGMENTS
) -> tuple[Plan, list[CutBlock]]:
    out.mkdir()
    checkpoint = Checkpoint.open(folder)
    check(checkpoint)
    losses = survey(checkpoint, segments)
    assert [decode(Losses, json.loads(json.dumps(encode(one)))) for one in losses] == losses
    plan = sizing.plan(checkpoint, losses, fraction, Sizing(part))
    reports = shrink(checkpoint, segments, out, plan, Fit())
    assert plan.removed >= fraction
    before, after = (
        sum(one.numel() for one in model.model.layers.parameters())
        for model in (stock_model(folder), stock_model(out))
    )
    assert plan.removed == pytest.approx(1 - after / before)
    assert before == sum(block.parameters_before for block in plan.blocks)
    return plan, reports


def loaded(folder: Path) -> Any:
    """By the stock loader, which has to know every weight."""
    found: Any = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, experts_implementation="eager"
    )
    model, information = found
    assert not any(information.values()), information
    return model.eval()


@pytest.fixture(scope="module", params=MIXTURES)
def without_experts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Plan, list[CutBlock]]:
    """A type, a folder with the model before and after, and what became of it."""
    folder = tmp_path_factory.mktemp(request.param)
    dense(folder / "dense", request.param)
    return request.param, folder, *run(folder / "dense", folder / "cut", 0.15, "both")


@torch.no_grad()
def test_without_experts_the_model_is_the_one_whose_router_never_chooses_them(
    without_experts: tuple[str, Path, Plan, list[CutBlock]],
) -> None:
    model_type, tmp_path, plan, reports = without_experts
    folder = tmp_path / "dense"
    model = loaded(tmp_path / "cut")
    assert plan.stock
    masked = stock_model(folder, experts_implementation="eager")
    names = family_of(model_type).experts
    assert names is not None
    for block, report in zip(masked.model.layers, reports, strict=True):
        if not report.before.experts:
            continue
        assert len(report.experts) == report.after.experts < EXPERTS
        gone = [one for one in range(EXPERTS) if one not in report.experts]
        block.get_submodule(names.router).register_forward_hook(_never(masked, gone))
    wanted = masked(SEGMENTS).logits
    torch.testing.assert_close(model(SEGMENTS).logits, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        load_model(tmp_path / "cut")(SEGMENTS).logits, wanted, rtol=1e-4, atol=1e-5
    )
    assert model.generate(SEGMENTS[:1, :3], max_new_tokens=4, do_sample=False).shape[1] > 3
    before, after = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("dense", "cut")
    )
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"num_local_experts"}
    # What stays is as it was, to the last bit.
    old, new = (tensors_of(tmp_path / name) for name in ("dense", "cut"))
    for index, report in enumerate(reports):
        stays = report.experts or range(report.before.experts)
        for place, expert in enumerate(stays):
            for name in (
                one for one in old if f"layers.{index}." in one and f"experts.{expert}." in one
            ):
                own = name.replace(f"experts.{expert}.", f"experts.{place}.")
                assert torch.equal(new[own], old[name])


def _never(model: Any, gone: list[int]) -> Any:
    """Route as if the scores of some experts were as low as can be."""

    def route(router: Any, arguments: tuple[torch.Tensor], _: object) -> Any:
        states = arguments[0].reshape(-1, arguments[0].shape[-1])
        logits = states @ router.weight.T + getattr(router, "bias", 0.0)
        logits[:, gone] = -torch.inf
        if model.config.model_type == "gpt_oss":
            top, chosen = logits.topk(router.top_k)
            return logits, top.softmax(-1), chosen
        top, chosen = logits.softmax(-1).topk(router.top_k)
        if getattr(router, "norm_topk_prob", True):
            top = top / top.sum(-1, keepdim=True)
        return logits, top, chosen

    return route


@torch.no_grad()
def test_scores_are_those_of_the_paper(
    without_experts: tuple[str, Path, Plan, list[CutBlock]],
) -> None:
    """In float64, token by token, up to the first block with experts, before which all is dense."""
    _, tmp_path, _, reports = without_experts
    model = load_model(tmp_path / "dense").double()
    first = next(index for index, one in enumerate(reports) if one.before.experts)
    calls: list[tuple[torch.Tensor, ...]] = []
    held = model.model.layers[first].mlp.experts
    held.register_forward_pre_hook(lambda _, arguments: calls.append(arguments))
    model(SEGMENTS)
    ((states, chosen, weights),) = calls
    found: list[list[float]] = [[] for _ in range(EXPERTS)]
    for x, numbers, gates in zip(states, chosen, weights, strict=True):
        for number, gate in zip(numbers.tolist(), gates, strict=True):
            output = held[number].out(held[number].gated(x[None]))
            found[number].append((gate * output.square().sum().sqrt()).item())
    scores = [sum(one) / len(one) if one else 0.0 for one in found]
    left = reports[first].after.experts
    best = sorted(range(EXPERTS), key=lambda number: -scores[number])[:left]
    assert reports[first].experts == tuple(sorted(best))
    gone = sum(sum(found[number]) for number in range(EXPERTS) if number not in best)
    lost = gone / sum(map(sum, found))
    assert reports[first].channels_error == pytest.approx(lost, rel=1e-4)


@every_mixture
@torch.no_grad()
def test_with_fewer_channels_the_model_is_the_one_with_zeros_in_their_place(
    tmp_path: Path, model_type: str
) -> None:
    folder = dense(tmp_path / "dense", model_type)
    plan, reports = run(folder, tmp_path / "cut", 0.1, "ffn")
    assert plan.stock
    model, masked, cut = (
        loaded(tmp_path / "cut"),
        load_model(folder),
        load_model(tmp_path / "cut"),
    )
    names = family_of(model_type).experts
    assert names is not None
    for whole, part, report in zip(masked.model.layers, cut.model.layers, reports, strict=True):
        for expert, kept in enumerate(report.expert_channels):
            assert len(kept) == report.after.channels < report.before.channels
            target, source = (
                block.get_submodule(names.consumer(expert)) for block in (whole, part)
            )
            matrix(target).zero_()
            matrix(target)[:, list(kept)] = matrix(source)
            if target.bias is not None:
                target.bias.copy_(source.bias)
        assert bool(report.expert_channels) == bool(report.before.experts)
    wanted = masked(SEGMENTS).logits
    torch.testing.assert_close(model(SEGMENTS).logits, wanted, rtol=1e-4, atol=1e-5)
    before, after = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("dense", "cut")
    )
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {names.channels}
    assert model.generate(SEGMENTS[:1, :3], max_new_tokens=4, do_sample=False).shape[1] > 3


def test_experts_that_saw_too_few_tokens_are_not_refitted(tmp_path: Path) -> None:
    folder = dense(tmp_path / "dense", "gpt_oss")
    _, reports = run(folder, tmp_path / "cut", 0.1, "ffn", SEGMENTS[:1, :30])
    said = {name: why for report in reports for name, why in report.unfitted.items()}
    assert said
    assert all("reached this layer" in why for why in said.values())
    old, new = (tensors_of(tmp_path / name) for name in ("dense", "cut"))
    for index, report in enumerate(reports):
        for expert, kept in enumerate(report.expert_channels):
            name = f"model.layers.{index}.mlp.experts.{expert}.down_proj"
            same = torch.equal(new[f"{name}.weight"], old[f"{name}.weight"][:, list(kept)])
            assert same == (name in said)


def test_a_router_keeps_as_many_experts_as_a_token_has(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(dense(tmp_path, "mixtral"))
    with pytest.raises(UsageError, match="there are 4, and a token is sent to 2 of them") as caught:
        experts.planned(checkpoint, 0.9, Sizing())
    nearest = float(caught.value.fix.split("structured:")[1].split(",")[0])
    assert experts.planned(checkpoint, nearest, Sizing())[0].experts == 2
    with pytest.raises(UsageError, match="too few channels"):
        experts.planned(checkpoint, 0.9, Sizing("ffn"))


@pytest.mark.parametrize(
    ("how", "fit", "said"),
    [
        (Sizing("heads"), Fit(), "heads cannot be cut out"),
        (Sizing("both", None, "loss"), Fit(), "one number for all blocks"),
        (Sizing(), Fit(dense_target=0.5), "--dense-target 0.5 cannot be used"),
    ],
    ids=["heads", "loss", "dense-target"],
)
def test_what_has_no_meaning_with_experts_is_refused(
    tmp_path: Path, how: Sizing, fit: Fit, said: str
) -> None:
    checkpoint = Checkpoint.open(dense(tmp_path, "mixtral"))
    with pytest.raises(UsageError, match=said):
        experts.check(checkpoint, 0.1, how, fit)


def test_experts_of_a_model_without_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match="has no experts"):
        sizing.check(Checkpoint.open(tiny_llama), 0.1, Sizing("experts"))

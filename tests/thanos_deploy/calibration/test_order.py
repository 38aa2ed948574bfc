"""How many statistics of experts are held at once; that it changes no byte."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.model_types import MIXTURES
from tests.recipes import plain
from tests.thanos_deploy.model.test_experts import SEGMENTS, tensors_of, write_mixture
from thanos_deploy.calibration import order
from thanos_deploy.calibration import walk as walking
from thanos_deploy.calibration.order import hessian_bytes, turns
from thanos_deploy.forecast import memory
from thanos_deploy.machine.devices import CPU
from thanos_deploy.methods import Walk
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.families import family_of
from thanos_deploy.model.structure import BlockStructure
from thanos_deploy.pattern import SemiStructured
from thanos_deploy.pruning import owl
from thanos_deploy.pruning.layers import prune
from thanos_deploy.pruning.recipe import Owl


@given(st.integers(1, 6), st.booleans(), st.integers(1, 60_000))
def test_every_group_has_its_turn_and_no_turn_takes_more_than_there_is_room_for(
    experts: int, true_sequential: bool, room: int
) -> None:
    gates = tuple((f"mlp.experts.{n}.gate", f"mlp.experts.{n}.up") for n in range(experts))
    downs = tuple((f"mlp.experts.{n}.down",) for n in range(experts))
    block = BlockStructure(
        "0.",
        ((("q", "k"),), (("o",),), gates, downs),
        frozenset(name for group in gates + downs for name in group),
    )
    inputs = {name: 48 if name.endswith("down") else 32 for name in block.linears}
    found = turns(block, inputs, true_sequential=true_sequential, room=room)
    assert sorted(group for turn in found for group in turn) == sorted(block.groups)
    for turn in found:
        assert [group for group in block.groups if group in turn] == turn
        routed = [group for group in turn if group[0] in block.routed]
        owners = {group[0].rpartition(".")[0] for group in routed}
        assert hessian_bytes(routed, inputs) <= room or len(owners) == 1
    if true_sequential:
        # No layer waits for one of a later turn.
        assert [group for turn in found for group in turn] == list(block.groups)
        return
    # Until the last turn nothing is pruned that an expert of a later one reads.
    for turn in found[:-1]:
        for group in turn:
            assert group[0] in block.routed
            assert {f"mlp.experts.{group[0].split('.')[2]}.down"} <= {one[0] for one in turn}


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("true_sequential", [True, False])
def test_experts_in_parts_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, true_sequential: bool, waits: bool
) -> None:
    sizes = MIXTURES["qwen3_moe"]
    checkpoint = Checkpoint.open(write_mixture(tmp_path / "dense", family_of("qwen3_moe"), sizes))
    monkeypatch.setattr(walking, "can_wait", lambda *_: waits)
    recipe = plain(
        SemiStructured(2, 4), "thanos", true_sequential=true_sequential, dense_target=0.5
    )
    written = []
    for name, room in (("whole", 1 << 30), ("parts", 1)):
        monkeypatch.setattr(turns, "__kwdefaults__", {"room": room})
        (tmp_path / name).mkdir()
        reports = prune(checkpoint, SEGMENTS, tmp_path / name, recipe)
        written.append(((tmp_path / name / "model.safetensors").read_bytes(), reports))
    assert written[0][0] == written[1][0]
    for one, other in zip(written[0][1], written[1][1], strict=True):
        assert [each.relative_error for each in one.layers] == [
            each.relative_error for each in other.layers
        ]


def test_outliers_are_counted_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(write_mixture(tmp_path, family_of("mixtral"), MIXTURES["mixtral"]))
    ratios = []
    for room in (1 << 30, 1):
        monkeypatch.setattr(turns, "__kwdefaults__", {"room": room})
        found = owl.survey(checkpoint, SEGMENTS, checkpoint.linears, Owl())
        ratios.append([one.ratio for one in found])
    assert ratios[0] == ratios[1]


@pytest.mark.parametrize("true_sequential", [True, False])
def test_the_forecast_names_what_is_held_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, true_sequential: bool
) -> None:
    checkpoint = Checkpoint.open(write_mixture(tmp_path, family_of("mixtral"), MIXTURES["mixtral"]))

    def forecast(room: int) -> int:
        monkeypatch.setattr(turns, "__kwdefaults__", {"room": room})
        terms = memory.of_pruning(
            checkpoint,
            SEGMENTS,
            checkpoint.blocks[0].linears,
            Walk(true_sequential=true_sequential),
            forward=torch.float32,
            dtype=None,
            device=CPU,
            place="auto",
        ).host
        return {term.name: term.bytes for term in terms}["statistics of inputs"]

    hidden, channels = 4 * 32**2, 4 * 48**2
    others = 0 if true_sequential else 2 * hidden
    whole = 4 * channels if true_sequential else others + 4 * (hidden + channels)
    assert forecast(order.EXPERTS_BYTES) == whole
    assert forecast(1) == (channels if true_sequential else others + hidden + channels)


def test_an_expert_with_fewer_tokens_than_inputs_gets_wandas_mask(tmp_path: Path) -> None:
    family, sizes = family_of("mixtral"), MIXTURES["mixtral"]
    checkpoint = Checkpoint.open(write_mixture(tmp_path / "dense", family, sizes))
    few = SEGMENTS[:1, :50]  # goes to two experts of four in each block
    for name in ("thanos", "wanda"):
        (tmp_path / name).mkdir()
    blocks = prune(checkpoint, few, tmp_path / "thanos", plain(SemiStructured(2, 4), "thanos"))
    prune(checkpoint, few, tmp_path / "wanda", plain(SemiStructured(2, 4), "wanda"))
    layers = {layer.name: layer for layer in blocks[0].layers}
    masked = [layer for layer in layers.values() if layer.solver == "wanda mask"]
    assert masked
    found, wanted, dense = (tensors_of(tmp_path / name) for name in ("thanos", "wanda", "dense"))
    for layer in layers.values():
        routed = ".experts." in layer.name
        said = (
            f"tokens of the calibration text reached this layer, fewer than its {layer.cols} inputs"
        )
        if layer not in masked:
            assert not layer.failures
            continue
        assert routed
        assert said in layer.failures[0] or "no token" in layer.failures[0]
        stored = checkpoint.stored_name(f"{layer.name}.weight")
        kept = found[stored] != 0
        assert torch.equal(found[stored][kept], dense[stored][kept])
        if layer.name.endswith(("w1", "w3")):  # which read what they do in the other model
            assert torch.equal(found[stored], wanted[stored])
    assert {layer.solver for name, layer in layers.items() if "self_attn" in name} == {"thanos"}

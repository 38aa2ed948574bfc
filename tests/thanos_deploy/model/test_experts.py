"""Blocks that differ, and experts: a toy of each kind of mixture that transformers has."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import VOCABULARY, stock_model
from tests.model_types import MIXTURES
from tests.recipes import plain
from thanos_deploy.calibration.collect import collect
from thanos_deploy.calibration.walk import visits
from thanos_deploy.errors import ModelError
from thanos_deploy.model import families
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.experts import SeparateExperts, separate
from thanos_deploy.model.families import Experts, Family
from thanos_deploy.model.linear import matrix
from thanos_deploy.model.load import load_model
from thanos_deploy.model.parts import part_bytes
from thanos_deploy.pattern import SemiStructured, Unstructured
from thanos_deploy.pruning import owl
from thanos_deploy.pruning.layers import prune
from thanos_deploy.pruning.recipe import Owl
from thanos_deploy.pruning.result import PrunedBlock

SEGMENTS = torch.randint(VOCABULARY, (6, 60), generator=torch.Generator().manual_seed(0))
TWO_FOUR = SemiStructured(2, 4)

_LLAMA = families.family_of("llama")
QWEN, MIXTRAL = families.family_of("qwen3_moe"), families.family_of("mixtral")
OSS = families.family_of("gpt_oss")

EXPERTS = 4
ROUTED, MIXED = MIXTURES["mixtral"], MIXTURES["qwen3_moe"]

every_mixture = pytest.mark.parametrize(
    ("family", "sizes"),
    [(families.family_of(name), sizes) for name, sizes in MIXTURES.items()],
    ids=list(MIXTURES),
)


def write_mixture(folder: Path, family: Family, sizes: dict[str, Any]) -> Path:
    """A random two-block model, as transformers stores it."""
    config = AutoConfig.for_model(
        family.model_types[0],
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            **sizes,
        },
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Of the files, with those of gpt_oss that hold all experts taken apart, entry by entry."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        place, _, end = name.rpartition(".")
        if not end.startswith(("gate_up_proj", "down_proj")) or end.endswith("weight"):
            found[name] = tensor
            continue
        if not place.endswith("experts"):
            found[name] = tensor
            continue
        kind = "bias" if end.endswith("_bias") else "weight"
        for expert, own in enumerate(tensor):
            rows = own.T if kind == "weight" else own  # outputs first
            if end.startswith("down"):
                found[f"{place}.{expert}.down_proj.{kind}"] = rows
                continue
            for first, layer in enumerate(("gate_proj", "up_proj")):
                picked = [rows[row] for row in range(first, len(rows), 2)]
                found[f"{place}.{expert}.{layer}.{kind}"] = torch.stack(picked)
    return found


def test_each_block_has_the_linear_layers_that_it_has(tmp_path: Path) -> None:
    first, second = Checkpoint.open(write_mixture(tmp_path, QWEN, MIXED)).blocks
    attention = tuple(f"self_attn.{name}_proj" for name in "qkvo")
    assert first.linears == (*attention, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert not first.routed
    pairs = [(f"mlp.experts.{n}.gate_proj", f"mlp.experts.{n}.up_proj") for n in range(EXPERTS)]
    downs = [(f"mlp.experts.{n}.down_proj",) for n in range(EXPERTS)]
    assert second.steps == (
        *((attention[:3],), (attention[3:],)),
        *(tuple(pairs), tuple(downs)),
    )
    assert second.routed == {name for group in (*pairs, *downs) for name in group}
    assert second.full_names[-1] == "model.layers.1.mlp.experts.3.down_proj"


@every_mixture
def test_every_weight_that_files_keep_goes_by_one_name(
    tmp_path: Path, family: Family, sizes: dict[str, Any]
) -> None:
    checkpoint = Checkpoint.open(write_mixture(tmp_path, family, sizes))
    stored = tensors_of(tmp_path)
    assert set(checkpoint.weights.stored.values()) == set(stored)
    for name, tensor in stored.items():
        assert torch.equal(checkpoint.weights.read([name])[name], tensor), name
    pruned = {checkpoint.stored_name(f"{name}.weight") for name in checkpoint.linears}
    in_blocks = {name for name, one in stored.items() if ".layers." in name and one.ndim == 2}
    routers = in_blocks - pruned
    assert all(name.endswith((".gate.weight", ".router.weight")) for name in routers)
    parts = part_bytes(checkpoint)
    assert sum(parts.values()) == sum(one.nbytes for one in stored.values())
    attention = {name for name in in_blocks if ".self_attn." in name}
    biases = {name for name in stored if ".experts." in name and name.endswith(".bias")}
    assert parts["mlp"] == sum(stored[one].nbytes for one in (in_blocks - attention) | biases)


def test_a_matrix_is_a_slice_of_what_the_library_keeps(tmp_path: Path) -> None:
    folder = write_mixture(tmp_path, MIXTRAL, ROUTED)
    model = stock_model(folder)
    held = model.model.layers[1].mlp.experts
    gate_up, down = held.gate_up_proj, held.down_proj
    separate(model, MIXTRAL)
    experts = model.model.layers[1].mlp.experts
    assert isinstance(experts, SeparateExperts)
    stored = load_file(folder / "model.safetensors")
    names = {"w1": gate_up[2, :48], "w3": gate_up[2, 48:], "w2": down[2]}
    for name, part in names.items():
        view = matrix(experts.get_submodule(f"2.{name}"))
        assert torch.equal(view, stored[f"model.layers.1.block_sparse_moe.experts.2.{name}.weight"])
        view[3, 5] = 7.0
        assert part[3, 5] == 7.0
    separate(model, MIXTRAL)  # again changes nothing
    assert model.model.layers[1].mlp.experts is experts


@every_mixture
@torch.no_grad()
def test_separate_experts_compute_what_the_librarys_do(
    tmp_path: Path, family: Family, sizes: dict[str, Any]
) -> None:
    folder = write_mixture(tmp_path, family, sizes)
    wanted = stock_model(folder, experts_implementation="eager")(SEGMENTS).logits
    torch.testing.assert_close(load_model(folder)(SEGMENTS).logits, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_statistics_count_the_tokens_that_an_expert_saw(tmp_path: Path) -> None:
    folder = write_mixture(tmp_path, MIXTRAL, ROUTED)
    model = stock_model(folder)
    calls: list[tuple[Any, ...]] = []
    model.model.layers[0].mlp.experts.register_forward_pre_hook(
        lambda _, arguments: calls.append(arguments)
    )
    model(SEGMENTS)
    ((states, chosen, _),) = calls
    walk = visits(Checkpoint.open(folder), SEGMENTS)
    visit = next(walk)
    found = collect(visit.walk, [group[0] for group in visit.structure.groups])
    assert found["self_attn.q_proj"].mass == SEGMENTS.numel()
    seen = [found[f"mlp.experts.{number}.w1"].mass for number in range(EXPERTS)]
    assert sum(seen) == 2 * SEGMENTS.numel()
    assert len(set(seen)) > 1
    for number in range(EXPERTS):
        x = states[(chosen == number).any(dim=1)]
        gate, up, _ = (
            visit.block.get_submodule(f"mlp.experts.{number}.{name}") for name in ("w1", "w3", "w2")
        )
        inner = torch.nn.functional.silu(gate(x)) * up(x)
        for name, read in (("w1", x), ("w2", inner)):
            statistics = found[f"mlp.experts.{number}.{name}"]
            assert statistics.mass == len(read)
            torch.testing.assert_close(statistics.hessian, read.T @ read, rtol=1e-4, atol=1e-4)


def pruned(
    checkpoint: Checkpoint, out: Path, method: str, segments: torch.Tensor = SEGMENTS, **how: Any
) -> list[PrunedBlock]:
    """The reports; `out` is made."""
    out.mkdir()
    return prune(checkpoint, segments, out, plain(TWO_FOUR, method, **how))


@every_mixture
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@torch.no_grad()
def test_every_expert_is_pruned_and_the_stock_loader_takes_it(
    tmp_path: Path, family: Family, sizes: dict[str, Any], method: str
) -> None:
    checkpoint = Checkpoint.open(write_mixture(tmp_path / "dense", family, sizes))
    blocks = pruned(checkpoint, tmp_path / "pruned", method)
    assert [layer.name for block in blocks for layer in block.layers] == list(checkpoint.linears)
    before, after = (tensors_of(tmp_path / name) for name in ("dense", "pruned"))
    assert before.keys() == after.keys()
    matrices = {checkpoint.stored_name(f"{name}.weight") for name in checkpoint.linears}
    for name, weight in after.items():
        if name in matrices:
            assert bool(((weight != 0).reshape(-1, 4).sum(dim=1) == 2).all()), name
        kept = weight != 0 if name in matrices else torch.ones_like(weight, dtype=torch.bool)
        assert torch.equal(weight[kept], before[name][kept]), name
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "pruned", experts_implementation="eager", output_loading_info=True
    )
    model, information = loaded
    assert not any(information.values()), information
    wanted = load_model(tmp_path / "pruned")(SEGMENTS).logits
    torch.testing.assert_close(model(SEGMENTS).logits, wanted, rtol=1e-4, atol=1e-5)
    assert model.generate(SEGMENTS[:1, :3], max_new_tokens=4, do_sample=False).shape[1] > 3


@torch.no_grad()
def test_what_an_expert_is_said_to_miss_is_what_it_misses_in_the_finished_model(
    tmp_path: Path,
) -> None:
    """With passes that wait: each expert has read what the pruned layers before it made."""
    checkpoint = Checkpoint.open(write_mixture(tmp_path / "dense", QWEN, MIXED))
    blocks = pruned(checkpoint, tmp_path / "pruned", "sparsegpt", true_sequential=True)
    model, seen = load_model(tmp_path / "pruned"), dict[str, torch.Tensor]()
    for name in checkpoint.linears:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, name=name: seen.update({name: arguments[0].flatten(0, -2)})
        )
    model(SEGMENTS)
    stored = load_file(tmp_path / "dense" / "model.safetensors")
    for layer in (layer for block in blocks for layer in block.layers):
        dense = stored[checkpoint.stored_name(f"{layer.name}.weight")]
        x, weight = seen[layer.name], matrix(model.get_submodule(layer.name))
        missed = (x @ (weight - dense).T).square().sum() / (x @ dense.T).square().sum()
        assert layer.relative_error == pytest.approx(missed.item(), rel=2e-3), layer.name


def test_experts_aim_at_their_own_output_and_are_tuned(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_mixture(tmp_path / "dense", QWEN, MIXED))
    blocks = pruned(checkpoint, tmp_path / "pruned", "sparsegpt", dense_target=0.5, tune_steps=2)
    assert all(layer.pattern_holds for block in blocks for layer in block.layers)
    assert all(not layer.failures for block in blocks for layer in block.layers)


def test_an_expert_that_saw_no_token_is_pruned_by_magnitude_and_says_so(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_mixture(tmp_path / "dense", MIXTRAL, ROUTED))
    one = SEGMENTS[:1, :1]  # goes to two experts of four in each block
    blocks = pruned(checkpoint, tmp_path / "pruned", "wanda", one)
    pruned(checkpoint, tmp_path / "magnitude", "magnitude")
    written, wanted = (
        load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "magnitude")
    )
    idle = [layer for block in blocks for layer in block.layers if layer.failures]
    assert len(idle) == 2 * 2 * 3
    for layer in idle:
        assert "no token" in layer.failures[0]
        name = checkpoint.stored_name(f"{layer.name}.weight")
        assert torch.equal(written[name], wanted[name])


def test_outliers_of_experts_are_counted(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_mixture(tmp_path, QWEN, MIXED))
    ratios = [one.ratio for one in owl.survey(checkpoint, SEGMENTS, checkpoint.linears, Owl())]
    assert len(ratios) == 2
    layers = [{name: 1 for name in block.full_names} for block in checkpoint.blocks]
    assert set(owl.allocate(ratios, layers, 0.5, Owl())) == set(checkpoint.linears)
    assert isinstance(owl.allocate(ratios, layers, 0.5, Owl())[checkpoint.linears[0]], Unstructured)


def test_experts_of_another_kind_are_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_mixture(tmp_path, OSS, MIXTURES["gpt_oss"])
    other = replace(OSS, experts=Experts("mlp.experts"))
    monkeypatch.setattr(families, "FAMILIES", (other,))
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.experts.*has_bias is True.*gate"):
        Checkpoint.open(folder)


def test_a_row_that_leaves_experts_out_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_mixture(tmp_path, QWEN, MIXED)
    monkeypatch.setattr(families, "FAMILIES", (replace(QWEN, experts=None),))
    with pytest.raises(
        ModelError,
        match=r"layers\.1: the block has parameters with several matrices.*experts\.gate_up_proj",
    ):
        Checkpoint.open(folder)


def test_a_row_that_leaves_a_linear_layer_out_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_mixture(tmp_path, QWEN, MIXED)
    monkeypatch.setattr(families, "FAMILIES", (replace(QWEN, inputs=QWEN.inputs[:-1]),))
    with pytest.raises(ModelError, match=r"does not name: mlp\.experts\.0\.down_proj"):
        Checkpoint.open(folder)

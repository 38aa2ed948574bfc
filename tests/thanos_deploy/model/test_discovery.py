"""Types without a row: what the blocks are is found, or the model is refused with a reason."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.byte_tokenizer import save_byte_tokenizer
from tests.conftest import EVERY_TYPE, VOCABULARY, Invoke, MakeModel, stock_model
from tests.recipes import plain
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.errors import ModelError
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.discovery import discover
from thanos_deploy.model.families import row_of
from thanos_deploy.model.linear import matrix
from thanos_deploy.pattern import SemiStructured
from thanos_deploy.pruning.layers import prune
from thanos_deploy.pruning.result import PRUNE

SEGMENTS = torch.randint(VOCABULARY, (6, 60), generator=torch.Generator().manual_seed(0))

# A plain one; attention and channels side by side; blocks that give tuples; blocks that differ.
TYPES: dict[str, dict[str, Any]] = {
    "stablelm": {},
    "cohere": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
}


def write(folder: Path, model_type: str, **sizes: Any) -> Path:
    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            **sizes,
        },
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


@pytest.mark.parametrize("model_type", EVERY_TYPE)
def test_what_is_discovered_is_what_a_row_says(make_model: MakeModel, model_type: str) -> None:
    found, row = discover(Checkpoint.open(make_model(model_type)).config), row_of(model_type)
    assert row is not None
    assert (found.blocks, found.inputs, found.transposed) == (
        row.blocks,
        row.inputs,
        row.transposed,
    )


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_a_model_without_a_row_is_pruned_and_says_what_each_layer_misses(
    tmp_path: Path, model_type: str
) -> None:
    folder = write(tmp_path / "dense", model_type, **TYPES[model_type])
    (tmp_path / "pruned").mkdir()
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.family.discovered
    blocks = prune(
        checkpoint,
        SEGMENTS,
        tmp_path / "pruned",
        plain(SemiStructured(2, 4), "sparsegpt", true_sequential=True),
    )
    model = stock_model(tmp_path / "pruned")
    linears = [
        f"{checkpoint.family.blocks}.{index}.{name}"
        for index, block in enumerate(model.get_submodule(checkpoint.family.blocks))
        for name, module in block.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    assert sorted(checkpoint.linears) == sorted(linears)
    before = load_file(folder / "model.safetensors")
    seen: dict[str, torch.Tensor] = {}
    for name in linears:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, name=name: seen.update({name: arguments[0].flatten(0, -2)})
        )
    model(SEGMENTS)
    for layer in (layer for block in blocks for layer in block.layers):
        dense = before[checkpoint.stored_name(f"{layer.name}.weight")]
        pruned = matrix(model.get_submodule(layer.name))
        assert bool(((pruned != 0).reshape(-1, 4).sum(dim=1) == 2).all()), layer.name
        wanted, got = seen[layer.name] @ dense.T, seen[layer.name] @ pruned.T
        missed = (got - wanted).square().sum() / wanted.square().sum()
        assert layer.relative_error == pytest.approx(missed.item(), rel=2e-3), layer.name
    assert model.generate(SEGMENTS[:1, :3], max_new_tokens=4, do_sample=False).shape[1] > 3


@pytest.mark.slow
def test_the_command_marks_it_and_cuts_nothing_out(tmp_path: Path, invoke: Invoke) -> None:
    folder = write(tmp_path / "dense", "stablelm")
    small = ("--nsamples", 4, "--seqlen", 64, "-q")
    out = tmp_path / "out"
    code, printed, _ = invoke("prune", folder, "--pattern", "2:4", "-o", out, *small, "--dry-run")
    assert code == 0
    assert "stablelm (discovered)" in printed
    assert invoke("prune", folder, "--pattern", "2:4", "-o", out, *small)[0] == 0
    assert Bundle.open(out).result(PRUNE).discovered
    code, _, errors = invoke("prune", folder, "--pattern", "structured:0.2", "-o", out, *small)
    assert code == 3
    assert "nothing can be cut out of a stablelm model" in errors


@pytest.mark.parametrize(
    ("model_type", "sizes", "reason"),
    [
        ("olmoe", {}, r"block 0 has several matrices in one parameter, mlp\.experts\.gate_up"),
        pytest.param("zamba2", {}, "there is no row for it, and", marks=pytest.mark.slow),
        ("t5", {}, "'t5' is not supported; supported are"),
    ],
)
def test_what_cannot_be_discovered_is_refused_with_the_reason(
    tmp_path: Path, model_type: str, sizes: dict[str, Any], reason: str
) -> None:
    AutoConfig.for_model(model_type, **sizes).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=reason):
        Checkpoint.outline(tmp_path)

"""Every family, and every layout that models of one family differ in, from pruning to text."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import EVERY_TYPE, VOCABULARY, MakeModel, stock_model
from tests.recipes import plain
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.families import family_of
from thanos_deploy.model.linear import matrix
from thanos_deploy.pattern import SemiStructured
from thanos_deploy.pruning.layers import prune

# Longer than the sliding windows.
SEGMENTS = torch.randint(VOCABULARY, (6, 60), generator=torch.Generator().manual_seed(0))

# What the row of a family leaves to the configuration and the weights.
LAYOUTS: dict[str, tuple[str, dict[str, object]]] = {
    **{model_type: (model_type, {}) for model_type in EVERY_TYPE},
    "llama, a head for each query": ("llama", {"num_key_value_heads": 4}),
    "llama, one key for all queries": ("llama", {"num_key_value_heads": 1, "head_dim": 12}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}),
    "mistral, window": ("mistral", {"sliding_window": 16}),
    "qwen2, window in one block": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3, biases, tied": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "gemma3_text, window everywhere": ("gemma3_text", {"layer_types": ["sliding_attention"] * 2}),
    "opt-350m, post-norm and projections": (
        "opt",
        {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    ),
    "opt, no biases": ("opt", {"enable_bias": False}),
    "gpt2, untied, no width given": ("gpt2", {"n_inner": None, "tie_word_embeddings": False}),
    "gpt_neox, sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt_neox, no biases, tied": (
        "gpt_neox",
        {"attention_bias": False, "tie_word_embeddings": True},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["thanos", "sparsegpt"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_layer_is_said_to_miss_is_what_it_misses_in_the_finished_model(
    make_model: MakeModel, tmp_path: Path, layout: str, method: str
) -> None:
    """Statistics are in order, so each layer has seen what the finished model passes it.

    The finished model is loaded by the stock loader, run as a whole, and generates.
    """
    model_type, sizes = LAYOUTS[layout]
    folder, family = make_model(model_type, **sizes), family_of(model_type)
    checkpoint = Checkpoint.open(folder)
    blocks = prune(
        checkpoint,
        SEGMENTS,
        tmp_path,
        plain(SemiStructured(2, 4), method, block_size=16, true_sequential=True),
    )
    linears = [
        f"{family.blocks}.{index}.{name}"
        for index in range(2)
        for group in family.inputs
        for name in group
    ]
    assert list(checkpoint.linears) == linears
    assert [layer.name for block in blocks for layer in block.layers] == linears

    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path))
    assert before.keys() == after.keys()
    for name in before.keys() - {f"{linear}.weight" for linear in linears}:
        assert torch.equal(before[name], after[name]), name

    model = stock_model(tmp_path, dtype=torch.float32)
    seen = {}
    for name in linears:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, name=name: seen.update({name: arguments[0].flatten(0, -2)})
        )
    with torch.no_grad():
        model(SEGMENTS)
    for layer in (layer for block in blocks for layer in block.layers):
        pruned = matrix(model.get_submodule(layer.name)).detach()
        assert bool(((pruned != 0).reshape(-1, 4).sum(dim=1) == 2).all()), layer.name
        dense = before[f"{layer.name}.weight"]
        dense = dense.T if family.transposed else dense
        wanted, got = seen[layer.name] @ dense.T, seen[layer.name] @ pruned.T
        missed = (got - wanted).square().sum() / wanted.square().sum()
        assert layer.relative_error == pytest.approx(missed.item(), rel=1e-3), layer.name
    text = model.generate(SEGMENTS[:1, :3], max_new_tokens=5, do_sample=False)
    assert text.shape[1] > 3

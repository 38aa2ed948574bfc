"""Dropping whole blocks: which ones, and what is left of the model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from exporters import gguf
from tests.conftest import VOCABULARY, Invoke, MakeModel, stock_model
from tests.model_types import EVERY_TYPE, MIXTURES
from tests.thanos_deploy.model.test_experts import write_mixture
from thanos_deploy.calibration.journal import Journal
from thanos_deploy.errors import UsageError
from thanos_deploy.methods import NO_TUNING, Tuning
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.depth import describe
from thanos_deploy.model.families import family_of
from thanos_deploy.model.loaders import of as judged
from thanos_deploy.pattern import Structured
from thanos_deploy.shrink import depth
from thanos_deploy.shrink.cut import shrink
from thanos_deploy.shrink.depth import Removal
from thanos_deploy.shrink.options import Fit
from thanos_deploy.shrink.result import CutBlock
from thanos_deploy.stages.request import PruneRequest

SEGMENTS = torch.randint(VOCABULARY, (3, 64), generator=torch.Generator().manual_seed(0))
IDS = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))

BLOCKS = 4

# What tells blocks apart, where a type has more than one kind.
KINDS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma2": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    "qwen3_moe": {"mlp_only_layers": [0], "decoder_sparse_step": 1},
}


def deep(make_model: MakeModel, model_type: str, **sizes: Any) -> Path:
    given = {"num_hidden_layers": BLOCKS, **KINDS.get(model_type, {}), **sizes}
    if model_type not in MIXTURES:
        return make_model(model_type, **given)
    folder = make_model("llama")  # for its tokenizer
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    return write_mixture(folder, family_of(model_type), {**MIXTURES[model_type], **given})


def drop(folder: Path, out: Path, blocks: list[int], tuning: Tuning = NO_TUNING) -> list[CutBlock]:
    out.mkdir()
    checkpoint = Checkpoint.open(folder)
    plan = depth.plan(checkpoint, [Removal(block, 0.1, {}) for block in blocks])
    return shrink(checkpoint, SEGMENTS, out, plan, Fit(), tuning)


def without(model: Any, family: Any, blocks: list[int]) -> Any:
    """A stock model whose forward pass leaves blocks out."""
    modules = model.get_submodule(family.blocks)
    for number in blocks:

        def skip(hidden: torch.Tensor, *_: Any, **__: Any) -> Any:
            return hidden if family.gives == 1 else (hidden, None)

        modules[number].forward = skip
    return model


@pytest.mark.parametrize("model_type", [*EVERY_TYPE, *MIXTURES])
def test_the_stock_loader_takes_what_is_left_and_it_computes_as_if_the_others_were_skipped(
    make_model: MakeModel, tmp_path: Path, model_type: str
) -> None:
    folder, out = deep(make_model, model_type), tmp_path / "out"
    family = Checkpoint.open(folder).family
    reports = drop(folder, out, [2, 1])
    assert [one.after.dropped for one in reports] == [False, True, True, False]
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    whole = without(stock_model(folder, dtype=torch.float32), family, [1, 2])
    with torch.no_grad():
        wanted = whole(IDS, use_cache=False).logits
        torch.testing.assert_close(model(IDS, use_cache=False).logits, wanted)
        torch.testing.assert_close(model(IDS).logits, wanted)  # with a key-value cache
    # Nothing but the numbers of the blocks has changed.
    assert len(Checkpoint.open(out).blocks) == BLOCKS - 2
    before, after = (
        json.loads((folder / "config.json").read_text()),
        json.loads((out / "config.json").read_text()),
    )
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert changed <= {
        *("num_hidden_layers", "n_layer", "layer_types", "no_rope_layers"),
        *("mlp_only_layers", "decoder_sparse_step"),
    }


def test_blocks_without_experts_are_told_by_their_new_numbers(make_model: MakeModel) -> None:
    folder = deep(make_model, "qwen3_moe", mlp_only_layers=[], decoder_sparse_step=2)
    checkpoint = Checkpoint.open(folder)
    assert [bool(block.routed) for block in checkpoint.blocks] == [False, True, False, True]
    entries = describe(checkpoint, [1, 2, 3])
    assert entries["mlp_only_layers"] == [1]
    assert entries["decoder_sparse_step"] == 1


def test_a_block_that_depends_on_its_number_is_refused(make_model: MakeModel) -> None:
    folder = deep(make_model, "gpt2", scale_attn_by_inverse_layer_idx=True)
    checkpoint = Checkpoint.open(folder)
    assert describe(checkpoint, [0, 1, 2])["n_layer"] == 3
    with pytest.raises(UsageError, match=r"block 2 would change by becoming block 1: .*scaling"):
        describe(checkpoint, [0, 2, 3])


def test_shards_keep_their_files(make_model: MakeModel, tmp_path: Path) -> None:
    folder = deep(make_model, "llama")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {}
    for name in tensors:
        number = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        places[name] = f"part-{number}.safetensors"
    for file in set(places.values()):
        save_file({name: t for name, t in tensors.items() if places[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    drop(folder, tmp_path / "out", [1])
    found = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert "part-1.safetensors" not in found["weight_map"].values()
    assert found["weight_map"]["model.layers.1.mlp.up_proj.weight"] == "part-2.safetensors"
    cut = stock_model(tmp_path / "out", dtype=torch.float32).state_dict()
    for name, tensor in tensors.items():
        if name.startswith("model.layers.2."):
            assert torch.equal(cut[name.replace("layers.2.", "layers.1.")], tensor)


def test_the_survey_takes_what_changes_least_one_by_one(make_model: MakeModel) -> None:
    """By stock models, of which every block is left out in turn."""
    folder = deep(make_model, "llama", num_hidden_layers=5)
    checkpoint = Checkpoint.open(folder)
    found = depth.survey(checkpoint, SEGMENTS, 0.4)

    def last(blocks: list[int]) -> torch.Tensor:
        model = without(stock_model(folder, dtype=torch.float32), checkpoint.family, blocks)
        caught: list[torch.Tensor] = []
        model.model.norm.register_forward_pre_hook(lambda _, seen: caught.append(seen[0]))
        with torch.no_grad():
            model(SEGMENTS)
        return caught[0]

    dense = last([])
    gone: list[int] = []
    for removal in found:
        changes = {}
        for block in set(range(5)) - set(gone):
            change = (last([*gone, block]) - dense).square().sum(-1) / dense.square().sum(-1)
            changes[block] = change.mean().item()
        assert removal.block == min(changes, key=lambda one: changes[one])
        # The survey may run in bfloat16.
        assert removal.change == pytest.approx(changes[removal.block], rel=0.05)
        gone.append(removal.block)
    assert len(gone) == 2


def test_a_journal_gives_the_removals_back_and_goes_on(
    make_model: MakeModel, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(deep(make_model, "llama"))
    whole = depth.survey(checkpoint, SEGMENTS, 0.5)
    first = Journal(tmp_path / "journal", {}, Removal)
    assert depth.survey(checkpoint, SEGMENTS, 0.25, journal=first)[0].block == whole[0].block
    again = depth.survey(
        checkpoint, SEGMENTS, 0.5, journal=Journal(tmp_path / "journal", {}, Removal)
    )
    assert [(one.block, one.change) for one in again] == [(one.block, one.change) for one in whole]
    assert again[0].seconds == first.reports[0].seconds


def test_a_walk_that_was_interrupted_after_a_dropped_block_goes_on(
    make_model: MakeModel, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(deep(make_model, "llama"))
    plan = depth.plan(checkpoint, [Removal(1, 0.1, {})])
    tuning = Tuning(tune_steps=2)

    class StoppedError(Exception):
        pass

    def stop(done: int, _: int) -> None:
        if done == 3:
            raise StoppedError

    for name in ("at once", "in two parts"):
        (tmp_path / name).mkdir()
    shrink(checkpoint, SEGMENTS, tmp_path / "at once", plan, Fit(), tuning)
    kept = tmp_path / "journal"
    (tmp_path / "part").mkdir()
    with pytest.raises(StoppedError):
        shrink(
            *(checkpoint, SEGMENTS, tmp_path / "part", plan, Fit(), tuning),
            journal=Journal(kept, {}, CutBlock),
            on_progress=stop,
        )
    journal = Journal(kept, {}, CutBlock)
    assert journal.reports[-1].after.dropped
    shrink(*(checkpoint, SEGMENTS, tmp_path / "in two parts", plan, Fit(), tuning), journal=journal)
    one, two = (tmp_path / name / "model.safetensors" for name in ("at once", "in two parts"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
def test_tuning_brings_the_blocks_behind_nearer_to_the_dense_model(
    make_model: MakeModel, tmp_path: Path
) -> None:
    folder = deep(make_model, "llama")
    dense, errors = stock_model(folder, dtype=torch.float32), []
    for name, tuning in (("untuned", NO_TUNING), ("tuned", Tuning(tune_steps=24))):
        reports = drop(folder, tmp_path / name, [1], tuning)
        # The block before the dropped one is that of the dense model, with nothing to tune.
        assert ["tune" in one.seconds for one in reports] == [
            *(False, False),
            *[tuning.tune_steps > 0] * 2,
        ]
        model = stock_model(tmp_path / name, dtype=torch.float32)
        with torch.no_grad():
            wanted, found = (one.base_model(SEGMENTS).last_hidden_state for one in (dense, model))
        errors.append(((found - wanted).square().sum() / wanted.square().sum()).item())
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shrink": "ffn"}, "--allocation blocks with --shrink"),
        ({"ffn_multiple": 4}, "--allocation blocks with --ffn-multiple"),
    ],
)
def test_what_has_no_meaning_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PruneRequest.of(Structured(0.2), allocation="blocks", **options)


def test_it_is_for_what_is_cut_out() -> None:
    with pytest.raises(UsageError, match="--allocation blocks"):
        PruneRequest.of(Structured(0.2), allocation="blocks", keep_shape=True)
    request = PruneRequest.of(Structured(0.2), allocation="blocks")
    assert PruneRequest.from_json(request.to_json()).to_json() == request.to_json()


def test_a_model_without_blocks_is_refused(make_model: MakeModel) -> None:
    checkpoint = Checkpoint.open(deep(make_model, "llama"))
    depth.check(checkpoint, 0.75)
    with pytest.raises(UsageError, match=r"remove at most structured:0\.75|no block"):
        depth.check(checkpoint, 0.76)


@pytest.mark.parametrize(("model_type", "step"), [("gemma2", 2), ("gemma3_text", 6)])
def test_llama_cpp_takes_windows_at_its_own_places_alone(model_type: str, step: int) -> None:
    kinds = ["sliding_attention" if (n + 1) % step else "full_attention" for n in range(2 * step)]
    config = {
        **{"model_type": model_type, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16},
        **{"num_key_value_heads": 2, "intermediate_size": 128, "layer_types": kinds},
    }
    assert judged(config, "llama.cpp").compatible
    broken = judged({**config, "layer_types": kinds[1:]}, "llama.cpp")
    assert not broken.compatible
    assert "whatever layer_types says" in broken.reasons[0]


def test_gguf_refuses_windows_at_other_places(make_model: MakeModel, tmp_path: Path) -> None:
    """A short text, with which llama.cpp's logits are compared, would not show it."""
    folder = make_model(
        "gemma2", num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2
    )
    drop(folder, tmp_path / "out", [1])
    with pytest.raises(UsageError, match="every second block attends to the whole text"):
        gguf.export(Checkpoint.open(tmp_path / "out"), tmp_path, dtype="fp16")


@pytest.mark.slow
def test_the_command_drops_reports_and_exports(
    make_model: MakeModel, tmp_path: Path, invoke: Invoke
) -> None:
    folder, out = deep(make_model, "llama"), tmp_path / "out"
    arguments = (
        *("prune", folder, "--pattern", "structured:0.25", "--allocation", "blocks"),
        *("--nsamples", "4", "--seqlen", "64", "-o", out),
    )
    code, shown, errors = invoke(*arguments, "--dry-run")
    assert code == 0, errors
    assert "dropped" in shown
    code, printed, errors = invoke(*arguments, "--json")
    assert code == 0, errors
    widths = json.loads(printed)["widths"]
    (gone,) = [n for n, one in enumerate(widths["blocks"]) if one["parameters_after"] == 0]
    assert widths["removed"] == 0.25
    assert widths["stock_config"]
    code, _, errors = invoke("export", out, "--target", "onnx")
    assert code == 0, errors
    code, shown, errors = invoke("report", out)
    assert code == 0, errors
    assert f"1 block was dropped, with 25.0% of the blocks' parameters ({gone})" in " ".join(
        shown.split()
    )
    assert "the blocks with the numbers" in (out / "README.md").read_text()


def test_a_sum_of_removals_is_the_change_of_the_whole(make_model: MakeModel) -> None:
    checkpoint = Checkpoint.open(deep(make_model, "llama"))
    plan = depth.plan(checkpoint, [Removal(2, 0.1, {}), Removal(0, 0.3, {})])
    assert [one.predicted_loss for one in plan.blocks] == pytest.approx([0.2, 0.0, 0.1, 0.0])
    assert plan.kept == (1, 3)
    assert plan.removed == 0.5

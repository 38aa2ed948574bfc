"""What a folder holds is the language model that its config.json describes, or it is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Invoke, MakeModel
from thanos_deploy.errors import ModelError
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.load import load_model


def change(folder: Path, add: dict[str, torch.Tensor], *, remove: tuple[str, ...] = ()) -> Path:
    path = folder / "model.safetensors"
    tensors = {name: one for name, one in load_file(path).items() if name not in remove}
    save_file({**tensors, **add}, path, metadata={"format": "pt"})
    return folder


def configure(folder: Path, **entries: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize(
    ("remove", "add", "message"),
    [
        (("lm_head.weight",), {}, r"lack 1 of 21 tensors \(lm_head.weight\)"),
        (("lm_head.weight",), {"score.weight": (2, 32)}, r"lack .*; and hold .*\(score.weight\)"),
        ((), {"v_head.summary.weight": (1, 32)}, "v_head.summary.weight"),
        ((), {"classifier.bias": (2,)}, "classifier.bias"),
    ],
)
def test_a_model_with_another_head_is_refused_at_the_start(
    make_model: MakeModel, remove: tuple[str, ...], add: dict[str, tuple[int, ...]], message: str
) -> None:
    folder = make_model("llama", tie_word_embeddings=False)
    change(folder, {name: torch.ones(shape) for name, shape in add.items()}, remove=remove)
    with pytest.raises(ModelError, match=message) as raised:
        Checkpoint.open(folder)
    assert "reward model" in raised.value.fix


def test_a_classifier_whose_embeddings_are_tied_is_refused(make_model: MakeModel) -> None:
    """Nothing is missing there: the head of a language model is its embedding."""
    folder = change(make_model("llama"), {"score.weight": torch.ones(2, 32)})
    with pytest.raises(ModelError, match=r"hold 1 of 21 tensors \(score.weight\)"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("name", "shape"), [("self_attn.q_norm.weight", (8,)), ("self_attn.q_proj.bias", (32,))]
)
def test_a_weight_that_the_configuration_knows_nothing_of_is_refused(
    make_model: MakeModel, name: str, shape: tuple[int, ...]
) -> None:
    """The library leaves it out without an error, and computes something else."""
    folder = change(make_model("llama"), {f"model.layers.0.{name}": torch.ones(shape)})
    with pytest.raises(ModelError, match=name) as raised:
        Checkpoint.open(folder)
    assert "one checkpoint" in raised.value.fix


def test_a_leftover_quantization_config_over_floats_is_dropped(make_model: MakeModel) -> None:
    folder = make_model("llama")
    plain = load_model(folder)
    configure(folder, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128})
    loaded = load_model(folder)
    for name, parameter in plain.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
    assert not hasattr(Checkpoint.open(folder).config, "quantization_config")


def test_a_kind_of_rotary_embedding_that_the_library_lacks_is_bad_input(
    make_model: MakeModel,
) -> None:
    folder = make_model("llama")
    configure(folder, rope_parameters={"rope_type": "spiral", "rope_theta": 10000.0})
    with pytest.raises(ModelError, match=r"config\.json: .*spiral"):
        Checkpoint.open(folder)


def test_a_folder_with_an_adapter_alone_says_to_merge_it(
    tmp_path: Path, tiny_llama: Path, invoke: Invoke
) -> None:
    shutil.copy(tiny_llama / "tokenizer.json", tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    save_file(
        {"base_model.model.q.lora_A.weight": torch.ones(2, 2)},
        tmp_path / "adapter_model.safetensors",
    )
    code, _, errors = invoke(
        "prune", tmp_path, "--pattern", "2:4", "-o", tmp_path / "o", "--dry-run"
    )
    assert code == 3
    assert "is an adapter" in errors
    assert "merge_and_unload" in errors


def test_an_adapter_beside_a_model_is_found_before_the_work(
    tmp_path: Path, tiny_llama: Path, invoke: Invoke
) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    code, _, errors = invoke(
        "prune-export", model, "--pattern", "2:4", "-o", tmp_path / "o", "--dry-run"
    )
    assert code == 3
    assert "adapter_config.json: this file belongs to an adapter" in errors


def test_tokens_that_the_model_has_no_embedding_for_are_found_by_a_dry_run(
    make_model: MakeModel, tmp_path: Path, invoke: Invoke
) -> None:
    model = make_model("llama", vocab_size=100, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    options = ("--nsamples", 2, "--seqlen", 64, "--dry-run")
    code, _, errors = invoke("prune", model, "--pattern", "2:4", "-o", tmp_path / "out", *options)
    assert code == 3
    assert "embeddings only for ids below 100" in errors
    assert not (tmp_path / "out").exists()

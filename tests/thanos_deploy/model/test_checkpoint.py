"""Checkpoints: every tensor is read and written as it is, and what is damaged is refused.

Every form in which a model may be stored has a case here, so this file is longer than others.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from exporters.packed import export
from tests.conftest import MakeModel, stock_model
from tests.recipes import plain
from thanos_deploy.errors import ModelError, PlatformError
from thanos_deploy.model import weights as weights_module
from thanos_deploy.model.checkpoint import DTYPES, Checkpoint
from thanos_deploy.model.companions import copy_companions
from thanos_deploy.model.convert import convert_gguf, convert_packed
from thanos_deploy.model.load import load_model, load_tokenizer
from thanos_deploy.model.locate import hash_folder, locate
from thanos_deploy.model.parts import part_bytes
from thanos_deploy.model.tensorfile import INDEX
from thanos_deploy.model.weights import Weights
from thanos_deploy.model.weights_copy import WeightsCopy
from thanos_deploy.pattern import SemiStructured
from thanos_deploy.pruning.layers import prune
from thanos_deploy.shrink import sizing
from thanos_deploy.shrink.cut import shrink
from thanos_deploy.shrink.options import Fit, Sizing
from thanos_deploy.shrink.sizing import cost
from thanos_deploy.shrink.survey import survey


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "damaged"))


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])


@settings(deadline=None, max_examples=40)
@given(tensors=st.dictionaries(st.text("abc.é", min_size=1), st.tuples(shapes, dtypes), min_size=1))
def test_a_copy_written_in_any_order_is_what_the_library_reads(
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("copy")
    original = {name: torch.randn(shape).to(dtype) for name, (shape, dtype) in tensors.items()}
    save_file(original, folder / "model.safetensors")
    (folder / "out").mkdir()
    weights = Weights(folder)
    with WeightsCopy(weights, folder / "out", None) as copy:
        for name in reversed(copy.missing):
            copy.write(name, weights.read([name])[name])
    reread = load_file(folder / "out" / "model.safetensors")
    assert reread.keys() == original.keys()
    assert all(torch.equal(reread[name], original[name]) for name in original)


def test_tensors_are_read_and_copied_in_pieces(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_module, "_ENTRIES_AT_ONCE", 1000)
    weights = Weights(make_model("llama", dtype=torch.bfloat16))
    original = load_file(weights.folder / "model.safetensors")
    assert {name: one.dtype for name, one in weights.read(original).items()} == weights.dtypes
    for name, tensor in weights.read(original, torch.float32).items():
        assert torch.equal(tensor, original[name].float())
    with WeightsCopy(weights, tmp_path, None) as copy:
        for name in copy.missing:
            copy.write_pieces(name, weights.pieces(name))
    copied = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(copied[name], original[name]) for name in original)


def test_a_local_folder_is_known_by_its_content(model: Path) -> None:
    before = locate(str(model))
    assert (before.source.kind, before.source.name, before.source.revision) == (
        "folder",
        "damaged",
        "",
    )
    assert locate(str(model)) == before
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert locate(str(model)).source.sha256 != before.source.sha256


@pytest.mark.parametrize("name", ["/no/such/model", "./nowhere", "missing.gguf", "a/b/c"])
def test_a_missing_path_is_bad_input(name: str) -> None:
    with pytest.raises(ModelError, match="no such file or folder"):
        locate(name)


def test_a_hub_id_that_is_not_cached_needs_the_network() -> None:
    with pytest.raises(PlatformError, match="nobody/nothing"):
        locate("nobody/nothing")


def test_a_hub_id_is_found_in_the_hubs_local_cache(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny_llama, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = locate("someone/tiny")
    source = found.source
    assert (source.kind, source.name, source.revision) == ("hub", "someone/tiny", commit)
    assert source.sha256 == locate(str(tiny_llama)).source.sha256
    assert Checkpoint.open(found.path).config.model_type == "llama"


def test_of_a_hub_model_only_the_weights_that_it_is_made_of_are_fetched(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = tmp_path / "origin"
    shutil.copytree(make_model("llama"), origin)
    stock_model(origin).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    (origin / "model.safetensors").unlink()
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    for path in (*shards, tmp_path / "sharded" / INDEX):
        shutil.copy(path, origin)
    (origin / "consolidated.safetensors").write_bytes(b"another copy")
    asked: list[str | None] = []
    fetched = tmp_path / "cache" / "0123abcd"
    fetched.mkdir(parents=True)

    def snapshot(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(revision)
        for path in origin.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns) and path != lost:
                shutil.copy(path, fetched)
        return str(fetched)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    lost: Path | None = origin / shards[-1].name
    with pytest.raises(
        PlatformError, match=f"1 of {len(shards)} weight files, .* {shards[-1].name}"
    ):
        locate("someone/tiny", revision="v2")
    lost = None
    found = locate("someone/tiny", revision="v2")
    assert asked == ["v2", "0123abcd"] * 2
    assert not (fetched / "consolidated.safetensors").exists()
    assert len(Checkpoint.open(found.path).linears) == 14


def test_a_gated_model_says_how_to_get_access(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        response: Any = SimpleNamespace(headers={}, request=None, status_code=403)
        raise GatedRepoError("403", response=response)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(PlatformError, match="meta-llama/Llama-3-8B: this model is gated") as caught:
        locate("meta-llama/Llama-3-8B")
    assert "HF_TOKEN" in caught.value.fix


def test_a_file_that_is_no_model_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"neither a \.gguf nor a \.safetensors file"):
        locate(str(tmp_path / "model.bin"))


@pytest.mark.parametrize(
    "content", ["{", "[]", "3", '{"eos_token_id": "x"}', '{"eos_token_id": [1, true]}']
)
def test_an_unusable_generation_configuration_is_bad_input(
    tiny_llama: Path, tmp_path: Path, content: str
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ModelError, match=r"generation_config\.json: not a readable generation"):
        Checkpoint.outline(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "missing"),
        ("{", "not a readable model configuration"),
        ("[]", "not a readable model configuration"),
        ('{"model_type": "nobody"}', "'nobody' is not supported; supported are .*llama"),
        pytest.param(
            '{"model_type": "mamba"}',
            r"'mamba' is not supported: .* does not call the layer mixer\.dt_proj",
            marks=pytest.mark.slow,
        ),
        ("{}", "'None' is not supported"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "not a readable model configuration"),
        ('{"model_type": "llama", "num_hidden_layers": 1000000000}', "is 1,000,000,000, more than"),
        ('{"model_type": "mixtral", "num_local_experts": 1000000000}', "num_local_experts is more"),
    ],
)
def test_an_unusable_configuration_is_bad_input(
    model: Path, content: str | None, message: str
) -> None:
    if content is None:
        (model / "config.json").unlink()
    else:
        (model / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        Checkpoint.open(model)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000])
def test_a_truncated_safetensors_file_is_bad_input(model: Path, keep: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model.safetensors: not a readable safetensors file"):
        Checkpoint.open(model)


def test_a_header_that_lies_is_bad_input(model: Path) -> None:
    path = model / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[:8] = (2**62).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        Checkpoint.open(model)


def test_pickled_weights_are_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pytorch_model.bin, which may run code"):
        Checkpoint.open(model)


def test_a_missing_shard_is_named(model: Path) -> None:
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model-00001-of-00002\.safetensors: missing"):
        Checkpoint.open(model)


def test_an_unreadable_index_is_bad_input(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match="not a readable index"):
        Checkpoint.open(model)


def test_a_missing_tensor_is_named(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ModelError, match=r"lack 1 of 20 tensors \(model.layers.1.mlp.up_proj.weig"):
        Checkpoint.open(model)


def test_quantised_tensors_are_refused(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ModelError, match=f"{name} is stored as I8"):
        Checkpoint.open(model)


def test_nan_weights_are_refused_with_their_count(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][3, :2] = float("nan")
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ModelError, match=f"2 of 1536 entries of {name} are NaN"):
        Checkpoint.open(model).weights.read([name])


def test_weights_without_the_base_models_prefix_are_found(make_model: MakeModel) -> None:
    folder = make_model("opt")
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(folder)
    name = "decoder.layers.0.fc1.weight"
    assert checkpoint.stored_name(f"model.{name}") == name
    stock_model(folder)  # such folders exist and load


def test_a_folder_without_a_tokenizer_is_bad_input(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(model)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all" * 100])
def test_a_corrupt_gguf_is_bad_input_and_leaves_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"model.gguf: not a readable GGUF file"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_gguf_of_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="'mamba' is not supported"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out")


# What the published files of a type hold besides parameters, in the attention of block {}.
BUFFERS = {
    "gpt2": {
        "h.{}.attn.bias": torch.ones(1, 1, 128, 128).tril(),
        "h.{}.attn.masked_bias": torch.tensor(-1e4),
    },
    "gpt_neox": {
        "gpt_neox.layers.{}.attention.bias": torch.ones(1, 1, 128, 128, dtype=torch.bool).tril(),
        "gpt_neox.layers.{}.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.{}.attention.rotary_emb.inv_freq": torch.ones(4, dtype=torch.float16),
    },
    "llama": {"model.layers.{}.self_attn.rotary_emb.inv_freq": torch.full((4,), float("inf"))},
    "opt": {"model.decoder.position_ids": torch.arange(128)},
}


def as_published(folder: Path, buffers: dict[str, torch.Tensor], *, bare: str = "") -> None:
    """Add tensors of every block to a model's file, and leave the base model's name out."""
    path = folder / "model.safetensors"
    tensors = {name.removeprefix(bare): one for name, one in load_file(path).items()}
    for name, tensor in buffers.items():
        tensors.update({name.format(block): tensor.clone() for block in range(2)})
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("model_type", BUFFERS)
@pytest.mark.parametrize("dtype", [None, torch.uint8, torch.int64, torch.float16])
def test_only_parameters_count_whatever_else_the_files_hold(
    model_type: str, dtype: torch.dtype | None, make_model: MakeModel
) -> None:
    plain, published = make_model(model_type), make_model(model_type)
    buffers = {
        name: one if dtype is None else torch.ones_like(one, dtype=dtype)
        for name, one in BUFFERS[model_type].items()
    }
    as_published(published, buffers, bare="transformer." if model_type == "gpt2" else "")
    expected, found = Checkpoint.open(plain), Checkpoint.open(published)
    assert found.parameters == expected.parameters == stock_model(plain).num_parameters()
    assert found.parameters == Checkpoint.outline(plain).parameters
    assert found.bytes_in("auto") == expected.bytes_in("auto") == 4 * found.parameters
    assert part_bytes(found) == part_bytes(expected)
    assert [cost(found, block) for block in range(2)] == [cost(expected, block) for block in (0, 1)]
    assert found.weights.stored.keys() == expected.weights.stored.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_outline_has_the_sizes_of_the_checkpoint_and_no_values(
    make_model: MakeModel, dtype: torch.dtype
) -> None:
    folder = make_model("llama", dtype=dtype)
    whole, outline = Checkpoint.open(folder), Checkpoint.outline(folder)
    for stored in ("auto", *DTYPES):
        assert outline.bytes_in(stored) == whole.bytes_in(stored)
    assert part_bytes(outline) == part_bytes(whole)
    name = outline.stored_name(f"{outline.linears[0]}.weight")
    for read in (lambda: outline.weights.read([name]), lambda: outline.weights.pieces(name)):
        with pytest.raises(ModelError, match="only the configuration was read"):
            read()


def stock_model_and_what_it_lacks(folder: Path) -> tuple[Any, dict[str, Any]]:
    loader: Any = AutoModelForCausalLM
    model, information = loader.from_pretrained(folder, output_loading_info=True)
    return model, information


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox"])
@pytest.mark.parametrize("way", ["prune", "shrink", "pack"])
def test_what_is_made_of_published_files_is_what_is_made_of_plain_ones(
    way: str,
    model_type: str,
    make_model: MakeModel,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    segments = torch.randint(257, (4, 60), generator=torch.Generator().manual_seed(0))
    made = []
    for name in ("plain", "published"):
        folder, out = make_model(model_type), tmp_path / name
        if name == "published":
            bare = "transformer." if model_type == "gpt2" else ""
            as_published(folder, BUFFERS[model_type], bare=bare)
        out.mkdir()
        source = Checkpoint.open(folder)
        if way == "shrink":
            plan = sizing.plan(source, survey(source, segments), 0.25, Sizing())
            assert 0.25 <= plan.removed < 0.4
            shrink(source, segments, out, plan, Fit())
        else:
            prune(
                source,
                segments,
                out,
                plain(SemiStructured(2, 4)),
            )
        if way == "pack":
            if name == "published":
                as_published(out, BUFFERS[model_type])
            (packed := tmp_path / f"{name}-packed").mkdir()
            export(Checkpoint.open(out), packed, pattern=SemiStructured(2, 4))
            convert_packed(packed, out := tmp_path / f"{name}-again")
        model, information = stock_model_and_what_it_lacks(out)
        assert not any(information.values()), information
        assert Checkpoint.open(out).weights.shapes.keys() == set(
            load_file(out / "model.safetensors")
        )
        made.append(model.state_dict())
    assert not [str(warning.message) for warning in recwarn]
    assert not [record.getMessage() for record in caplog.records]
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


@pytest.mark.parametrize("kept", ["embeddings", "head", "both"])
def test_a_tied_head_counts_once_however_often_it_is_stored(
    kept: str, model: Path, tmp_path: Path
) -> None:
    expected = Checkpoint.open(model).parameters
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if kept != "both":
        del tensors["model.embed_tokens.weight" if kept == "head" else "lm_head.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(model)
    assert checkpoint.parameters == expected
    prune(
        checkpoint,
        torch.zeros(1, 8, dtype=torch.long),
        tmp_path,
        plain(SemiStructured(2, 4)),
    )
    stock = stock_model(tmp_path)
    assert stock.lm_head.weight is stock.model.embed_tokens.weight


def test_a_parameter_that_is_stored_twice_and_differs_is_refused(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1
    for name in ("lm_head.weight", "embed_tokens.weight"):
        save_file({**tensors, name: head}, model / "model.safetensors")
        with pytest.raises(ModelError, match=f"{name}.* differ"):
            Checkpoint.open(model)


@pytest.mark.parametrize("name", ["qweight", "weight_packed", "weight"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float8_e4m3fn])
def test_what_stands_in_the_place_of_a_weight_is_said_to_be_quantised(
    name: str, dtype: torch.dtype, model: Path
) -> None:
    tensors = load_file(model / "model.safetensors")
    module = "model.layers.1.mlp.up_proj"
    tensors[f"{module}.{name}"] = tensors.pop(f"{module}.weight").to(dtype)
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ModelError, match=f"{module}.{name} is stored as"):
        Checkpoint.open(model)


def test_tensors_of_types_that_are_not_read_do_not_stand_in_the_way(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["scales"] = torch.ones(3).to(torch.float8_e4m3fn)
    save_file(tensors, model / "model.safetensors")
    weights = Checkpoint.open(model).weights
    assert "scales" not in weights.shapes
    weights.read(weights.shapes)


def test_two_sets_of_weights_are_refused_and_one_under_two_names_is_not(model: Path) -> None:
    index, tensors = model / "model.safetensors.index.json", load_file(model / "model.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model.safetensors")}))
    assert Checkpoint.open(model).parameters
    save_file(tensors, model / "model-00001-of-00001.safetensors")
    shard = "model-00001-of-00001.safetensors"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard)}))
    for reads in (Checkpoint.open, load_model):
        with pytest.raises(ModelError, match="two sets of weights"):
            reads(model)
    (model / "model.safetensors").unlink()
    assert Checkpoint.open(model).parameters


def test_only_what_belongs_to_the_new_model_goes_along(model: Path, tmp_path: Path) -> None:
    own = {path.name for path in model.glob("*.json")}
    for name in (
        *("adapter_config.json", "trainer_state.json", "all_results.json", "quantize_config.json"),
        *("pytorch_model.bin.index.json", "model.fp16.safetensors.index.json", "modules.json"),
        *("requirements.txt", "training_args.json", "optimizer.pt", "adapter_model.safetensors"),
    ):
        (model / name).write_text("{}")
    for name in (
        "vocab.txt",
        "merges.txt",
        "tokenizer.model",
        "chat_template.jinja",
        "LICENSE.txt",
        "LICENSE",
        "USE_POLICY.md",
    ):
        (model / name).write_text("x")
        own.add(name)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (model / "config.json").write_text(json.dumps(config))
    (model / "model.safetensors.index.json").write_text("x")
    before = hash_folder(model)
    (model / "LICENSE").write_text("y")
    assert hash_folder(model) == before
    copy_companions(model, tmp_path, None)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == own
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from tests.conftest import MODEL_TYPES, VOCABULARY, MakeModel
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.families import FAMILIES
from thanos_deploy.model.loaders import DEMANDS, LOADERS, Dimensions, judge, tensor_parallel
from thanos_deploy.shrink import sizing
from thanos_deploy.shrink.cut import shrink
from thanos_deploy.shrink.options import Fit, Part, Sizing
from thanos_deploy.shrink.survey import survey

LLAMA = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
}


def verdicts(config: dict[str, Any]) -> dict[str, bool | None]:
    return {verdict.loader.split()[0]: verdict.compatible for verdict in judge(config)}


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def test_without_a_number_of_key_value_heads_every_query_head_has_its_own() -> None:
    config = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
    for one in (config, {**config, "num_key_value_heads": None}):
        assert Dimensions.of(one).kv_heads == config["num_attention_heads"]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_loader_is_asked_about_every_family(make_model: MakeModel, model_type: str) -> None:
    folder = make_model(model_type)
    sizes = Dimensions.of(config_of(folder))
    assert (sizes.hidden, sizes.heads, sizes.channels) == (32, 4, 48)
    seen = verdicts(config_of(folder))
    # A head of 12 fits none of vLLM's attention kernels.
    assert seen["vLLM"] is (sizes.head == 8)
    # 48 channels are not four times 32, OPT is not known, and Gemma 3 has a window in each of the
    # first five blocks, not only in the first.
    assert seen["llama.cpp"] is (model_type not in ("opt", "gpt2", "gemma3_text"))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma2", "gpt2", "gpt_neox"])
def test_a_shrunk_model_is_judged_by_what_was_written(
    make_model: MakeModel, model_type: str, tmp_path: Path
) -> None:
    head = {"head_dim": 16} if model_type in ("qwen3", "gemma2") else {}
    folder = make_model(model_type, num_attention_heads=8, hidden_size=64, **head)
    checkpoint = Checkpoint.open(folder)
    segments = torch.randint(VOCABULARY, (4, 60), generator=torch.Generator().manual_seed(0))
    part: Part = "both" if checkpoint.family.heads.free_size else "ffn"
    plan = sizing.plan(checkpoint, survey(checkpoint, segments), 0.15, Sizing(part))
    shrink(checkpoint, segments, tmp_path, plan, Fit())
    config = config_of(tmp_path)
    sizes = Dimensions.of(config)
    assert sizes != Dimensions.of(config_of(folder))
    follows = sizes.head * sizes.heads == sizes.hidden
    seen = verdicts(config)
    # vLLM's Qwen2 reads no head_dim; everything else that it takes, it takes shrunk.
    assert seen["vLLM"] is (model_type != "qwen2" or follows)
    assert seen["llama.cpp"] is (model_type != "gpt2")
    # Loaders look for an output head of its own exactly if the embeddings are not tied.
    with safe_open(tmp_path / "model.safetensors", "np") as weights:
        own = {"lm_head.weight", "embed_out.weight"} & set(weights.keys())
    assert bool(own) is not config.get("tie_word_embeddings", True)


@pytest.mark.parametrize(
    ("change", "loader", "part"),
    [
        ({"num_key_value_heads": 2}, "vLLM", "multiple of the key-value heads"),
        ({"model_type": "qwen2", "num_attention_heads": 6}, "vLLM", "whatever head_dim says"),
        ({"head_dim": 20}, "vLLM", "multiple of 8"),
        ({"num_attention_heads": 6}, "text-generation-inference", "whatever head_dim says"),
        ({"head_dim": 33}, "llama.cpp", "even"),
        (
            {"model_type": "opt", "ffn_dim": 3072},
            "llama.cpp",
            "does not support models of this type",
        ),
    ],
)
def test_a_broken_constraint_is_named_with_its_source(
    change: dict[str, Any], loader: str, part: str
) -> None:
    (verdict,) = (found for found in judge({**LLAMA, **change}) if found.loader.startswith(loader))
    assert verdict.compatible is False
    assert any(part in reason and ".py" in reason for reason in verdict.reasons)


@pytest.mark.parametrize(
    ("change", "tested"),
    [({}, "vLLM 0.32"), ({"model_type": "mistral"}, None), ({"num_key_value_heads": 2}, None)],
    ids=["served", "only read", "refused"],
)
def test_a_loader_is_tested_with_what_the_tests_serve(
    change: dict[str, Any], tested: str | None
) -> None:
    assert [one.tested for one in judge({**LLAMA, **change})] == [tested, None, None]


def test_a_loader_whose_source_was_not_read_for_a_model_type_is_not_judged() -> None:
    seen = verdicts({**LLAMA, "model_type": "mistral"})
    assert seen == {"vLLM": True, "text-generation-inference": None, "llama.cpp": True}


@pytest.mark.parametrize(
    ("channels", "note"),
    [
        (1536, "576 are not multiples of 256"),
        (1216, "576, 1216 are not multiples of 256"),
        (1230, "rows of 1230 stay in F16"),
    ],
)
def test_the_blocks_that_rows_can_be_quantised_in(channels: int, note: str) -> None:
    (verdict,) = (
        found
        for found in judge({**LLAMA, "intermediate_size": channels})
        if found.loader == "llama.cpp"
    )
    assert note in verdict.notes


@given(st.integers(1, 12), st.integers(1, 8), st.integers(1, 400))
def test_a_model_is_split_only_where_every_gpu_gets_as_much(
    kv_heads: int, group: int, channels: int
) -> None:
    sizes = Dimensions(64, kv_heads * group, kv_heads, 8, channels)
    splits = tensor_parallel(sizes)
    assert splits[0] == 1
    for gpus in splits:
        per_gpu = max(1, sizes.kv_heads // gpus)
        assert sizes.heads % gpus == sizes.channels % gpus == 0
        assert (sizes.heads // gpus) % per_gpu == 0  # whole groups of queries


def test_every_demand_names_a_file_and_a_loader() -> None:
    readings = [reading for family in FAMILIES for reading in family.readings]
    sources = [constraint.source for loader in LOADERS for constraint in loader.constraints]
    sources += [reading.source for reading in readings if reading.demand is not None]
    assert all(any(end in one for end in (".py", ".cpp")) for one in sources)
    assert {reading.loader for reading in readings} == {loader.name for loader in LOADERS}
    assert {reading.demand for reading in readings} - {None} == set(DEMANDS)


def test_every_reading_is_of_a_model_type_of_its_row() -> None:
    for family in FAMILIES:
        for reading in family.readings:
            assert set(reading.model_types) <= set(family.model_types)

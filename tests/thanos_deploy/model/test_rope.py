"""Rows beside longer rows: what they get is what they get alone, or it is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

import exporters.onnx.graph
from exporters.triton import repository
from runtime.engine import Engine, open_engine, open_slots
from runtime.engines.onnxruntime import open_graph
from runtime.generate import generate_batch
from tests.conftest import VOCABULARY, Invoke, MakeModel, stock_model
from tests.store import Store
from thanos_deploy.bundle.files import Json
from thanos_deploy.bundle.manifest import claim
from thanos_deploy.bundle.record import Source
from thanos_deploy.errors import InputError
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.rope import Change, change_in, change_of

pytestmark = pytest.mark.slow

TRAINED, MOST = 16, 128
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "factor": 8.0,
    "original_max_position_embeddings": TRAINED,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
Bundles = Callable[[str], Path]


@pytest.fixture(scope="session")
def scaled(make_model: MakeModel, store: Store) -> Bundles:
    """Makes a bundle of the tiny LLaMA with another rotary embedding. Not to be changed."""

    def make(name: str, out: Path) -> None:
        parameters = DYNAMIC if name == "dynamic" else LONGROPE
        model = make_model(rope_parameters=dict(parameters))

        def produce(folder: Path) -> Json:
            shutil.copytree(model, folder / "model")
            (folder / "onnx").mkdir()
            exporters.onnx.graph.export(
                Checkpoint.open(model),
                folder / "onnx",
                pattern=None,
                max_sequence=TRAINED if name == "short" else None,
            )
            return {}

        with claim(out, Source("folder", "tiny", "", "")) as bundle:
            bundle.run("onnx", produce, options={}, inputs={})

    return lambda name: store.folder(f"rope-{name}", lambda out: make(name, out))


def expected(bundle: Path, ids: np.ndarray) -> np.ndarray:
    """float32[tokens, vocabulary], by transformers, of the whole text at once."""
    with torch.inference_mode():
        model = stock_model(bundle / "model", dtype=torch.float32)
        return np.asarray(model(torch.from_numpy(ids)[None]).logits[0])


def text(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(VOCABULARY - 1, size=length)


def test_a_model_whose_rows_would_change_each_other_is_not_served(
    scaled: Bundles, invoke: Invoke
) -> None:
    bundle = scaled("longrope")
    with pytest.raises(InputError, match=r"longrope.* more than 16 tokens") as refused:
        open_slots(bundle, slots=4)
    assert f"--max-seq {TRAINED}" in (refused.value.fix or "")
    code, _, error = invoke("serve", bundle, "--port", 0)
    assert code == 3
    assert "longrope" in error


def test_nor_is_a_repository_for_triton_made_of_it(scaled: Bundles, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="longrope"):
        repository.export(
            scaled("longrope"),
            tmp_path,
            name="x",
            engines={},
            tensorrt_options={},
            text_options={},
            text_model=Path(),
        )


def test_up_to_the_change_rows_get_what_they_get_alone(scaled: Bundles) -> None:
    bundle = scaled("short")
    slots = open_slots(bundle, slots=2)
    assert slots.max_sequence == TRAINED
    texts = [text(TRAINED), text(5, seed=1)]
    together = slots.join([row.tolist() for row in texts]).read(1000)
    assert together is not None
    for row, logits in zip(texts, together, strict=True):
        np.testing.assert_allclose(logits, expected(bundle, row)[-1], atol=2e-5)


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_rows_of_a_batch_may_differ_up_to_the_change_only(scaled: Bundles, backend: str) -> None:
    engine: Engine = open_engine(scaled("longrope"), backend=backend)
    rows = [text(4).tolist(), text(TRAINED - 2, seed=1).tolist()]
    seen: list[tuple[int | None, ...]] = []
    with pytest.raises(InputError, match="rows of 7 to 17 tokens"):
        seen.extend(generate_batch(engine, rows, new_tokens=10))
    assert len(seen) == 3
    alone = generate_batch(engine, rows[1:], new_tokens=10)
    assert len(list(alone)) == 10
    alike = generate_batch(engine, [rows[1], text(TRAINED - 2).tolist()], new_tokens=10)
    assert len(list(alike)) == 10


def test_a_long_text_is_read_as_the_model_reads_it(
    scaled: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.graph._TOKENS_AT_ONCE", 8)
    bundle = scaled("longrope")
    graph = open_graph(bundle)
    for length in (TRAINED, TRAINED + 1, 60):
        ids = text(length)
        read = np.concatenate(list(graph.read(ids)))
        np.testing.assert_allclose(read, expected(bundle, ids), atol=2e-5)


def test_dynamic_scaling_begins_beyond_what_a_graph_takes(scaled: Bundles) -> None:
    bundle = scaled("dynamic")
    assert open_slots(bundle, slots=2).max_sequence == MOST
    ids = text(MOST)
    read = np.concatenate(list(open_graph(bundle).read(ids)))
    np.testing.assert_allclose(read, expected(bundle, ids), atol=5e-5)


KINDS: dict[str, Json] = {
    "default": {},
    "linear": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 32},
    "llama3": {
        **{"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 32,
    },
    "longrope": {name: LONGROPE[name] for name in ("short_factor", "long_factor", "factor")},
    "dynamic": {"factor": 2.0},
}


@given(
    kind=st.sampled_from(sorted(KINDS)),
    most=st.integers(40, 90),
    trained=st.sampled_from([None, 20, 33]),
    older=st.booleans(),
    short=st.integers(1, 8),
    long=st.integers(9, 120),
)
@settings(max_examples=60, deadline=None)
def test_the_change_is_where_transformers_changes(
    kind: str, most: int, trained: int | None, older: bool, short: int, long: int
) -> None:
    scaling = dict(KINDS[kind])
    if trained is not None and kind == "longrope":
        scaling["original_max_position_embeddings"] = trained
    written: Json = (
        {"rope_theta": 1e4, "rope_scaling": {"type": kind, **scaling}}
        if older
        else {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **scaling}}
    )
    if kind == "default" and older:
        written.pop("rope_scaling")
    written["max_position_embeddings"] = most
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    small = {"vocab_size": 8, "intermediate_size": 8, "num_key_value_heads": 4}
    config = AutoConfig.for_model("llama", **sizes, **small, **json.loads(json.dumps(written)))
    rotary: Any = AutoModelForCausalLM.from_config(config).model.rotary_emb
    x, alone = torch.zeros(1), torch.arange(short)[None]
    usual = rotary(x, alone)[0].clone()
    beside = rotary(x, torch.arange(long)[None])[0][:, :short]
    change = change_of(written)
    assert change_of(config.to_dict()) == change
    differs = not torch.allclose(usual, beside, atol=1e-6) and short > 1
    if change is None:
        assert not differs
    else:
        assert differs == (long > change.tokens and short > 1)


def test_the_layers_of_each_type_count() -> None:
    plain = {"rope_type": "default", "rope_theta": 1e4}
    both = {"full_attention": LONGROPE, "sliding_attention": plain}
    assert change_of({"rope_parameters": both, "max_position_embeddings": 99}) == Change(
        "longrope", TRAINED
    )
    nothing: Json = {"rope_scaling": None, "rope_parameters": {"full_attention": plain}}
    assert change_of(nothing) is None


def test_a_bundle_without_a_model_is_measured_on_equal_rows_only(tmp_path: Path) -> None:
    assert change_in(tmp_path) is None
    (tmp_path / "model").mkdir()
    with pytest.raises(InputError, match=r"config\.json: not a readable model configuration"):
        change_in(tmp_path)

"""Fixtures with small random models; tests download nothing and leave nothing behind."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub reads it

import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import hypothesis
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is defined: it runs on the CPU

import exporters.onnx.graph
from exporters.options import ExportRequest
from tests import presets, traced
from tests.byte_tokenizer import save_byte_tokenizer
from tests.model_types import CUT_TYPES as CUT_TYPES
from tests.model_types import EVERY_TYPE as EVERY_TYPE
from tests.model_types import MODEL_TYPES as MODEL_TYPES
from tests.model_types import SIZES
from tests.recipes import plain
from tests.store import Store
from thanos_deploy import cli
from thanos_deploy.bundle.codec import encode
from thanos_deploy.bundle.files import Json, write_record
from thanos_deploy.bundle.graph_record import GraphResult, read_graph_record
from thanos_deploy.bundle.layout import GRAPH_RECORD, LAYERS
from thanos_deploy.bundle.manifest import claim
from thanos_deploy.bundle.record import Source
from thanos_deploy.measure import ceilings
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.pattern import SemiStructured
from thanos_deploy.progress import quietly
from thanos_deploy.pruning.layers import prune
from thanos_deploy.pruning.result import PruneResult
from thanos_deploy.shrink import sizing
from thanos_deploy.shrink.cut import shrink
from thanos_deploy.shrink.options import Fit, Sizing
from thanos_deploy.shrink.survey import survey
from thanos_deploy.stages.dense import Dense
from thanos_deploy.stages.export import export_dense

presets.make_quick()

MakeModel = Callable[..., Path]
Exported = Callable[[str], Path]
Invoke = Callable[..., tuple[int, str, str]]

# Modules that take longest come first, so that no process is left with one of them at the end. The
# first process gets the first and the third module: both use the real model, whose dense bundle is
# made once, so that no other process waits for it. Modules that fork commands come before those
# whose fork server imports less (see `tests.commands`). `pytest -p tests.costs` shows the times.
LONGEST = (
    *("test_real_model.py", "test_graph.py", "test_real_model_shrunk.py", "test_cli.py"),
    *("test_bytes.py", "test_gpu_campaign.py", "test_journal.py", "test_engine_build.py"),
    *("test_sparse_mma.py", "test_cli_bench.py", "test_triton_kernels.py", "test_cli_evaluate.py"),
)

# Fixtures that run every stage of a command; `make test-fast` leaves out the tests that use them.
WHOLE = {"demo", "finished", "made"}

# No test may depend on the speed of the machine.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# No test cuts the power, so data need not reach the disk, and waiting for the disk adds up.
setattr(os, "fsync", lambda descriptor: None)  # noqa: B010  # mypy would want os's own type

# Every benchmark measures the peak speed of the machine; for small models, small matrices suffice.
ceilings._MATRIX["cpu"] = 128

# Result in the manifest for a model that was pruned to 2:4.
PRUNED = PruneResult(
    pattern_holds=True,
    median_relative_error=0.01,
    worst_relative_error=0.02,
    worst_layer="model.layers.0.mlp.up_proj",
    largest_damping=0.01,
    dense_bytes=1000,
)
VOCABULARY = 257


@pytest.hookimpl(tryfirst=True)  # before pytest looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the slowest modules first, and mark tests that need a run of a whole command as slow."""
    for item in items:
        if WHOLE.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)

    def place(item: pytest.Item) -> int:
        return LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)

    items.sort(key=place)


def pytest_collection() -> None:
    """Disable garbage collection while the tests are imported.

    Importing makes no garbage, and looking for it takes a fifth of the time.
    """
    gc.disable()


def pytest_collection_finish() -> None:
    """Enable garbage collection, and exclude from it all objects that exist after the imports."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Unfreeze these objects at the end; otherwise nanobind reports its own ones as leaked."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The folders that all test processes share."""
    return Store(tmp_path_factory)


@pytest.fixture(scope="session", autouse=True)
def _shared_traces(store: Store) -> None:
    """Share traced graphs, so that each model structure is traced once in a run, by any process."""
    traced.share(store.folder("traces", lambda folder: None))


@pytest.fixture(autouse=True)
def _own_cache(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Give each test its own cache, which has the export of the tiny model if the test uses it."""
    # Not beside the tests' own folders, which pytest lists whenever it makes a new one.
    caches = tmp_path_factory.getbasetemp() / "caches"
    caches.mkdir(exist_ok=True)
    cache = mkdtemp(dir=caches)
    if "tiny_llama" in request.fixturenames:
        shutil.copytree(request.getfixturevalue("tiny_cache"), cache, dirs_exist_ok=True)
    monkeypatch.setenv("THANOS_DEPLOY_CACHE", cache)


@pytest.fixture(scope="session")
def tiny_cache(store: Store, tiny_llama: Path) -> Path:
    """A cache with the ONNX graph of the tiny LLaMA. Not to be changed."""

    def make(cache: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("THANOS_DEPLOY_CACHE", str(cache))
            export_dense(Dense(str(tiny_llama)), ExportRequest(), announce=quietly)

    return store.folder("cache", make)


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """A function that runs the command in this process.

    It returns the exit code, the standard output and the standard error.
    """

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["thanos-deploy", *map(str, arguments)])
        code = cli._run()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """A function that makes a folder with a random two-block model and a byte tokenizer."""

    def make(
        model_type: str = "llama", *, dtype: torch.dtype = torch.float32, **sizes: object
    ) -> Path:
        folder = tmp_path_factory.mktemp(model_type)
        write_model(folder, model_type, dtype=dtype, **sizes)
        return folder

    return make


def write_model(
    folder: Path, model_type: str, *, dtype: torch.dtype = torch.float32, **sizes: object
) -> None:
    """Write a random two-block model with a byte tokenizer; the weights are always the same."""
    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "bos_token_id": 256,
            "eos_token_id": 256,
            "pad_token_id": 256,
            **SIZES[model_type],
            **sizes,
        },
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # with the usual 0.02, results would hardly differ
        torch.nn.init.normal_(parameter, std=0.2)
    model.to(dtype).save_pretrained(folder)
    save_byte_tokenizer(folder)


@pytest.fixture(scope="session")
def tiny_llama(store: Store) -> Path:
    """A random two-block LLaMA with grouped query attention. Not to be changed."""
    return store.folder("llama", lambda folder: write_model(folder, "llama"))


@pytest.fixture(scope="session")
def exported_llama(tiny_llama: Path, store: Store) -> Path:
    """A bundle with the tiny LLaMA and its ONNX export. Not to be changed."""

    def produce(folder: Path) -> Json:
        shutil.copytree(tiny_llama, folder / "model")
        (folder / "onnx").mkdir()
        exporters.onnx.graph.export(Checkpoint.open(tiny_llama), folder / "onnx", pattern=None)
        return {}

    def make(out: Path) -> None:
        with claim(out, Source("folder", "tiny", "", "")) as bundle:
            bundle.run("onnx", produce, options={}, inputs={})

    return store.folder("llama-bundle", make)


@pytest.fixture(scope="session")
def last_logits(tiny_llama: Path, store: Store) -> Path:
    """A graph of the tiny LLaMA that computes only the last token's logits. Not to be changed."""

    def make(folder: Path) -> None:
        exporters.onnx.graph.export(
            Checkpoint.open(tiny_llama), folder, pattern=None, logits="last"
        )

    return store.folder("last-logits", make)


@pytest.fixture(scope="session")
def exported_two_four(make_model: MakeModel, store: Store) -> Exported:
    """A function that makes a folder with a small 2:4 model, `model`, and its export, `onnx`."""

    def make(model_type: str, folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "onnx").mkdir()
        blocks = prune(
            Checkpoint.open(make_model(model_type)),
            torch.randint(VOCABULARY, (4, 60), generator=torch.Generator().manual_seed(0)),
            folder / "model",
            plain(SemiStructured(2, 4), "thanos", block_size=16),
        )
        write_record(folder / LAYERS, blocks)
        exporters.onnx.graph.export(
            Checkpoint.open(folder / "model"),
            folder / "onnx",
            pattern=SemiStructured(2, 4),
            origin={"method": "thanos"},
        )

    return lambda model_type: store.folder(
        f"{model_type}-two-four", lambda folder: make(model_type, folder)
    )


@pytest.fixture(scope="session")
def exported_ort(make_model: MakeModel, store: Store) -> Exported:
    """A function that makes a bundle with a small model and its graph for ONNX Runtime alone."""

    def produce(folder: Path, model_type: str) -> Json:
        # Sizes of heads to which ONNX Runtime's attention can apply rotary embeddings.
        wider: dict[str, dict[str, object]] = {
            "opt": {"hidden_size": 64, "word_embed_proj_dim": 64},
            "gemma2": {"head_dim": 16},
            "glm4": {"head_dim": 32},
        }
        model = make_model(model_type, **wider.get(model_type, {"hidden_size": 64}))
        shutil.copytree(model, folder / "model")
        (folder / "onnx").mkdir()
        record = exporters.onnx.graph.export(
            Checkpoint.open(model), folder / "onnx", pattern=None, graph="ort"
        )
        assert record.graph == "ort"
        return {}

    def make(model_type: str, out: Path) -> None:
        with claim(out, Source("folder", "tiny", "", "")) as bundle:
            bundle.run("onnx", partial(produce, model_type=model_type), options={}, inputs={})

    return lambda model_type: store.folder(f"{model_type}-ort", lambda out: make(model_type, out))


@pytest.fixture(scope="session")
def two_four_bundle(exported_two_four: Exported, store: Store) -> Path:
    """A bundle with the tiny LLaMA at 2:4 and its ONNX export. Not to be changed."""
    folder = exported_two_four("llama")

    def copy(part: str) -> Callable[[Path], Json]:
        def produce(destination: Path) -> Json:
            shutil.copytree(folder / part, destination / part)
            if part == "model":
                shutil.copy(folder / LAYERS, destination)
                return encode(PRUNED)
            return encode(GraphResult.of(read_graph_record(folder / part / GRAPH_RECORD)))

        return produce

    def make(out: Path) -> None:
        with claim(out, Source("folder", "Tiny LLaMA", "", "")) as bundle:
            options = {"pattern": "2:4", "method": "thanos"}
            bundle.run("prune", copy("model"), options=options, inputs={})
            inputs = {"model": bundle.model_sha256}
            bundle.run("onnx", copy("onnx"), options=encode(ExportRequest()), inputs=inputs)

    return store.folder("two-four-bundle", make)


@pytest.fixture(scope="session")
def exported_shrunk(make_model: MakeModel, store: Store) -> Exported:
    """A function that makes a folder with `model` and its export, `onnx`.

    The blocks of the small model differ in width.
    """

    def make(model_type: str, folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "onnx").mkdir()
        checkpoint = Checkpoint.open(make_model(model_type))
        segments = torch.randint(VOCABULARY, (6, 100), generator=torch.Generator().manual_seed(0))
        plan = sizing.plan(
            checkpoint,
            survey(checkpoint, segments),
            0.15,
            Sizing("both" if model_type == "llama" else "heads", allocation="loss"),
        )
        shrink(checkpoint, segments, folder / "model", plan, Fit())
        exporters.onnx.graph.export(
            Checkpoint.open(folder / "model"), folder / "onnx", pattern=None
        )

    return lambda model_type: store.folder(
        f"{model_type}-shrunk", lambda folder: make(model_type, folder)
    )


def stock_model(folder: Path, **options: object) -> Any:
    """Load a model for inference as a user of transformers alone would.

    Typed as Any: transformers' own types say that `generate` cannot be called.
    """
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()

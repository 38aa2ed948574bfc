"""`thanos-deploy eval`: of the checkpoint and of the graph, on a text and in tasks.

The tests read what a few evaluations have left, so they are in one long file.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from exporters.options import ExportRequest
from tests.bundles import report_of
from tests.conftest import Invoke, MakeModel, stock_model
from tests.gguf_file import write_gguf
from thanos_deploy.bundle.manifest import Bundle, claim
from thanos_deploy.model.load import load_tokenizer
from thanos_deploy.pattern import SemiStructured
from thanos_deploy.progress import quietly
from thanos_deploy.stages.dense import Dense
from thanos_deploy.stages.export import export, export_dense
from thanos_deploy.stages.prune import prune
from thanos_deploy.stages.request import PruneRequest

pytestmark = pytest.mark.slow

TEXT = ("--segments", "2", "--seqlen", "300", "-q", "--json")


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> Path:
    """Takes texts that are longer than what is read at once."""
    return make_model("llama", max_position_embeddings=512)


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pruned and exported bundle, and a cache with its dense model. Not to be changed."""
    cache = tmp_path_factory.mktemp("eval-cache")
    out = tmp_path_factory.mktemp("eval") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THANOS_DEPLOY_CACHE", str(cache))
        dense = Dense(str(model))
        request = PruneRequest.of(SemiStructured(2, 4), nsamples=4, seqlen=64, block_size=16)
        with claim(out, dense.source) as bundle:
            prune(bundle, dense, request)
            export(bundle)
            export_dense(dense, ExportRequest(), quietly)
    return out, cache


@pytest.fixture
def out(made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the bundle and of the cache."""
    cache = shutil.copytree(made[1], tmp_path / "cache")
    monkeypatch.setenv("THANOS_DEPLOY_CACHE", str(cache))
    return Path(shutil.copytree(made[0], tmp_path / "out"))


def judged(out: Path, model: Path, invoke: Invoke) -> dict[str, Any]:
    """What `eval` says of the bundle and of the dense model, by runtime."""
    found: dict[str, Any] = {}
    for runtime in ("torch", "onnx"):
        code, printed, errors = invoke("eval", out, "--dense", model, "--runtime", runtime, *TEXT)
        assert code == 0, errors
        found[runtime] = json.loads(printed)
    return found


def test_the_graph_has_the_quality_of_its_checkpoint_and_the_report_shows_both(
    out: Path, model: Path, invoke: Invoke
) -> None:
    found = judged(out, model, invoke)
    for who in ("dense", "pruned"):
        assert found["onnx"][who]["value"] == pytest.approx(found["torch"][who]["value"], rel=1e-5)
    assert (out / "eval" / "perplexity.json").is_file()
    kept = json.loads((out / "eval" / "perplexity-onnx.json").read_text())
    assert kept["value"] == found["onnx"]["pruned"]["value"]
    before = Bundle.open(out).stages["eval-onnx"].finished
    assert invoke("eval", out, "--dense", model, "--runtime", "onnx", *TEXT)[0] == 0
    assert Bundle.open(out).stages["eval-onnx"].finished == before

    assert invoke("report", out)[0] == 0
    (shown,) = report_of(out)["models"]
    assert shown["graph_quality"]["pruned"] == kept["value"]
    assert any("fp32 graph itself" in sentence for sentence in shown["verdict"])
    assert not any("graph itself" in entry["what"] for entry in shown["not_measured"])
    assert "perplexity of the ONNX graph" in (out / "README.md").read_text()
    assert any("--runtime onnx" in command for command in shown["commands"])


def test_a_pruned_model_is_beside_the_dense_one_and_the_report_shows_it(
    out: Path, model: Path, invoke: Invoke
) -> None:
    run = ("eval", out, "--dense", model, *TEXT)
    code, printed, errors = invoke(*run)
    assert code == 0, errors
    found = json.loads(printed)
    dense, pruned = found["dense"], found["pruned"]
    assert pruned["fidelity"]["divergence"] > 0
    assert "fidelity" not in dense
    for kind in ("words", "choices"):
        questions = pruned[kind]["questions"]
        assert questions == dense[kind]["questions"] > 0
        shares = (one[kind]["accuracy"]["estimate"] for one in (dense, pruned))
        before, after = (round(share * questions) for share in shares)
        assert pruned[kind]["change"]["estimate"] == pytest.approx((after - before) / questions)
    assert json.loads((out / "eval" / "perplexity.json").read_text())["fidelity"]

    assert invoke("report", out)[0] == 0
    (shown,) = report_of(out)["models"]
    assert shown["fidelity"] == pruned["fidelity"]
    assert [one["kind"] for one in shown["answers"]] == ["last words", "multiple choice"]
    assert shown["answers"][1]["change"] == pruned["choices"]["change"]
    for text in ((out / "README.md").read_text(), (out / "report" / "report.md").read_text()):
        assert "divergence from the dense model" in text
        assert "questions about the text (last words)" in text
    code, printed, _ = invoke(*run[:-1])
    assert code == 0
    assert "same most likely token" in printed


def test_the_dense_model_is_asked_once_for_all_bundles_on_a_text(
    out: Path, model: Path, invoke: Invoke, tmp_path: Path
) -> None:
    run = ("eval", "--dense", model, *TEXT)
    other = shutil.copytree(out, tmp_path / "other")
    first = invoke(*run, out)[1]
    (outputs,) = tmp_path.glob("cache/*/eval/outputs.safetensors")
    written = outputs.stat().st_mtime_ns
    assert invoke(*run, other)[1] == first
    assert outputs.stat().st_mtime_ns == written
    # The outputs are those of one text, and are made anew for another one.
    for bundle, questions in ((other, "5"), (out, "7")):
        asked = (*run, bundle, "--questions", questions, "--overwrite")
        found = json.loads(invoke(*asked)[1])
        assert found["pruned"]["choices"]["questions"] == int(questions)


def test_a_model_by_itself_has_shares_and_nothing_to_compare_them_with(
    model: Path, invoke: Invoke
) -> None:
    found = json.loads(invoke("eval", model, *TEXT, "--questions", "0")[1])
    assert found["words"]["questions"] > 0
    assert not found.keys() & {"choices", "fidelity"}
    code, printed, _ = invoke("eval", model, *TEXT[:-1])
    assert code == 0
    assert "multiple choice" in printed
    assert "change" not in printed


def test_a_graph_of_rounded_weights_has_a_quality_of_its_own(
    out: Path, model: Path, invoke: Invoke
) -> None:
    run = ("eval", out, "--dense", model, "--runtime", "onnx", *TEXT)
    exact = json.loads(invoke(*run)[1])
    assert invoke("export", out, "--target", "onnx", "--dtype", "int8", "--overwrite")[0] == 0
    assert invoke("report", out)[0] == 0
    (shown,) = report_of(out)["models"]
    assert "eval-onnx" in shown["stale"]
    assert shown["graph_quality"] is None
    rounded = json.loads(invoke(*run)[1])
    for who in ("dense", "pruned"):
        assert rounded[who]["value"] != exact[who]["value"]
        assert rounded[who]["value"] == pytest.approx(exact[who]["value"], rel=0.1)


def test_a_float16_graph_is_as_good_as_its_checkpoint(
    out: Path, model: Path, invoke: Invoke
) -> None:
    assert invoke("export", out, "--target", "onnx", "--dtype", "fp16", "--overwrite")[0] == 0
    found = judged(out, model, invoke)
    for who in ("dense", "pruned"):
        by_torch, by_graph = (found[runtime][who]["value"] for runtime in ("torch", "onnx"))
        assert by_graph != by_torch
        # Float16 rounds by up to 2^-11, and not everything in one direction.
        assert by_graph == pytest.approx(by_torch, rel=2**-9)


def test_a_gguf_file_is_measured_like_the_folder_that_it_was_made_from(
    make_model: MakeModel, tmp_path: Path, invoke: Invoke
) -> None:
    folder = make_model("qwen2", max_position_embeddings=512)
    write_gguf(folder, tmp_path / "model.gguf")
    found = []
    for measured in (folder, tmp_path / "model.gguf"):
        code, printed, errors = invoke("eval", measured, *TEXT)
        assert code == 0, errors
        found.append(json.loads(printed))
    assert found[0]["value"] == found[1]["value"]


def test_any_model_is_measured_by_itself(out: Path, model: Path, invoke: Invoke) -> None:
    """A folder, a bundle and its graph; a bundle keeps only what is beside the dense model."""
    files = sorted(out.rglob("*"))

    def value(*arguments: object) -> float:
        code, printed, errors = invoke("eval", *arguments, *TEXT)
        assert code == 0, errors
        return float(json.loads(printed)["value"])

    pruned = value(out)
    assert value(out / "model") == pruned
    assert value(out, "--runtime", "onnx") == pytest.approx(pruned, rel=1e-5)
    dense = value(model)
    assert value(model, "--runtime", "onnx") == pytest.approx(dense, rel=1e-5)
    assert dense != pruned
    assert sorted(out.rglob("*")) == files


def test_a_graph_that_was_not_exported_is_not_measured(
    out: Path, model: Path, invoke: Invoke
) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["stages"]["onnx"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    for dense in (("--dense", model), ()):
        code, printed, errors = invoke("eval", out, *dense, "--runtime", "onnx", *TEXT)
        assert (code, printed) == (3, "")
        assert "thanos-deploy export" in errors


def test_a_graph_of_the_last_logits_has_no_perplexity(
    out: Path, model: Path, invoke: Invoke
) -> None:
    graph = ("export", out, "--target", "onnx")
    assert invoke(*graph, "--logits", "last", "--overwrite")[0] == 0
    made = (out / "manifest.json").read_bytes()
    assert invoke(*graph)[0] == 0  # as it was made
    assert (out / "manifest.json").read_bytes() == made
    for dense in (("--dense", model), ()):
        code, printed, errors = invoke("eval", out, *dense, "--runtime", "onnx", *TEXT)
        assert (code, printed) == (3, "")
        assert "--target onnx --logits all --overwrite" in " ".join(errors.split())


# Tasks of lm-evaluation-harness, with local data. What is right is what the dense model says.


@pytest.fixture(scope="module")
def tasks(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task of each kind: choosing, going on, and predicting a text."""
    folder = tmp_path_factory.mktemp("tasks")
    dense, tokenizer = stock_model(model), load_tokenizer(model)

    def ids(text: str) -> torch.Tensor:
        return tokenizer(text, return_tensors="pt")["input_ids"]  # type: ignore[no-any-return]

    def likelihood(question: str, answer: str) -> float:
        whole = ids(question + answer)
        with torch.no_grad():
            odds = dense(whole).logits[0].log_softmax(-1)
        start = ids(question).shape[1]
        return float(sum(odds[p - 1, whole[0, p]].item() for p in range(start, whole.shape[1])))

    def choose(question: str, choices: list[str]) -> dict[str, Any]:
        best = max(choices, key=lambda choice: likelihood(question, choice))
        return {"question": question, "choices": choices, "answer": choices.index(best)}

    def go_on(question: str) -> dict[str, Any]:
        text = dense.generate(ids(question), max_new_tokens=6, do_sample=False)[0]
        return {
            "question": question,
            "answer": tokenizer.decode(text[-6:], skip_special_tokens=True),
        }

    colours = ("The sky is", "Grass is", "Snow is")
    rows: dict[str, list[Any]] = {
        "choosing": [choose(c, [" blue", " green indeed", " white"]) for c in colours],
        "going_on": [go_on(c) for c in colours],
        "predicting": [{"text": "The sky is blue and the grass is green. " * 20}],
    }
    shared = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1}}
    kinds: dict[str, Any] = {
        "choosing": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        },
        "going_on": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\u0001\u0002"], "max_gen_toks": 6, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
        "predicting": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "byte_perplexity"}],
        },
    }
    for name, kind in kinds.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        files = {"dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / f"{name}.yaml").write_text(
            yaml.safe_dump({"task": name, **shared, **files, **kind})
        )
    return folder


@pytest.fixture(autouse=True)
def _own_data_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="lm-evaluation-harness is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


# More than the model's window.
TOO_LONG = {
    "output_type": "generate_until",
    "generation_kwargs": {"until": ["x"], "max_gen_toks": 600},
    "metric_list": [{"metric": "exact_match"}],
}
ALL = ("--tasks", "choosing,going_on,predicting", "-q", "--json")


def test_tasks_say_of_the_graph_what_they_say_of_the_checkpoint(
    out: Path, model: Path, tasks: Path, invoke: Invoke
) -> None:
    found = {}
    for runtime in ("torch", "onnx"):
        code, printed, errors = invoke(
            "eval", out, "--dense", model, "--task-folder", tasks, "--runtime", runtime, *ALL
        )
        assert code == 0, errors
        found[runtime] = json.loads(printed)
    for who in ("dense", "pruned"):
        by_torch, by_graph = (found[runtime][who]["scores"] for runtime in ("torch", "onnx"))
        assert [score["task"] for score in by_torch] == ["choosing", "going_on", "predicting"]
        assert [score["samples"] for score in by_torch] == [3, 3, 1]
        for one, two in zip(by_torch, by_graph, strict=True):
            assert two["value"] == pytest.approx(one["value"], rel=1e-4)
    assert [score["value"] for score in found["onnx"]["dense"]["scores"][:2]] == [1.0, 1.0]

    assert invoke("report", out)[0] == 0
    (shown,) = report_of(out)["models"]
    assert len(shown["tasks"]) == 6
    card = (out / "README.md").read_text()
    assert "| choosing, acc | 1.000 |" in card
    assert "lm-evaluation-harness, zero-shot, with 3 choosing" in card
    assert not any("quality on tasks" in entry["what"] for entry in shown["not_measured"])


def test_fewer_examples_and_one_model_alone(model: Path, tasks: Path, invoke: Invoke) -> None:
    run = ("eval", model, "--tasks", "choosing", "--task-folder", tasks, "--limit", "2", "-q")
    code, printed, errors = invoke(*run, "--json")
    assert code == 0, errors
    assert [score["samples"] for score in json.loads(printed)["scores"]] == [2]
    code, printed, _ = invoke(*run)
    assert code == 0
    assert "choosing" in printed


@pytest.mark.parametrize(
    ("broken", "code", "message"),
    [
        ({"dataset_path": "nobody/nothing"}, 4, "hub that cannot be reached"),
        ({"dataset_kwargs": {"data_files": {"test": "/no/such.jsonl"}}}, 3, "cannot be loaded"),
        ({"doc_to_text": "{{no_such_field}}"}, 3, "'no_such_field' is undefined"),
        (TOO_LONG, 3, "a task does not fit its data or the model"),
    ],
    ids=["hub", "data", "field", "window"],
)
def test_a_task_that_does_not_work_says_why(
    model: Path,
    tasks: Path,
    tmp_path: Path,
    invoke: Invoke,
    broken: dict[str, Any],
    code: int,
    message: str,
) -> None:
    task = yaml.safe_load((tasks / "choosing.yaml").read_text())
    (tmp_path / "tasks").mkdir()
    text = yaml.safe_dump({**task, "task": "broken", **broken})
    (tmp_path / "tasks" / "broken.yaml").write_text(text)
    run = ("eval", model, "--tasks", "broken", "--task-folder", tmp_path / "tasks", "-q")
    actual, printed, errors = invoke(*run)
    assert (actual, printed) == (code, ""), errors
    assert message in errors


def test_names_and_folders_that_are_none_are_refused(
    model: Path, tasks: Path, tmp_path: Path, invoke: Invoke
) -> None:
    code, _, errors = invoke("eval", model, "--tasks", "no-such", "--task-folder", tasks)
    assert code == 2
    assert "--tasks no-such: no such task" in errors
    code, _, errors = invoke("eval", model, "--tasks", "x", "--task-folder", tmp_path / "none")
    assert code == 3
    assert "no such folder" in errors
    code, _, errors = invoke("eval", model, "--limit", "3")
    assert code == 2
    assert "only with --tasks" in errors


def test_without_the_library_the_extra_is_named(
    model: Path, tasks: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    # A limit of its own, because what was found out about a request is remembered.
    code, _, errors = invoke("eval", model, "--tasks", "choosing", "--limit", "9")
    assert code == 4
    assert "pip install 'thanos-deploy[eval]'" in errors

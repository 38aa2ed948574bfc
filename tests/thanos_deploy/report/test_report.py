"""A report says what the files of a bundle say, on one bundle and on several.

The tests share the bundles that they write, so they are in one long file.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests import bundles
from tests.bundles import SCHEMA, add_build, checked, run, write_bundle
from thanos_deploy.bundle import manifest
from thanos_deploy.bundle.codec import Json, decode, encode
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.errors import InputError, IntegrityError, UsageError
from thanos_deploy.measure.quality import EVAL, EVAL_ONNX, TextQuality
from thanos_deploy.pruning.result import PrunedBlock, PrunedLayer
from thanos_deploy.report import build, charts, markdown, page, sources
from thanos_deploy.report.figures import figures
from thanos_deploy.report.model import FORMAT, ModelReport, Report
from thanos_deploy.report.sources import Sources


def report_on(*paths: Path, **options: Any) -> Json:
    """The report, checked against its schema."""
    report = build.build(read(*paths), **options)
    written = checked(json.loads(json.dumps(encode(report), allow_nan=False)))
    assert decode(Report, written) == report
    return written


def read(*paths: Path) -> list[Sources]:
    return sources.share([sources.read(Bundle.open(path)) for path in paths])


def page_of(report: Json, *paths: Path) -> str:
    return page.render(decode(Report, report), read(*paths))


def test_the_schema_is_one_and_names_the_format() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["format"]["const"] == FORMAT


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "unstructured:0.5", "structured:0.2"])
def test_every_pattern_has_a_report_of_the_published_form(pattern: str, tmp_path: Path) -> None:
    out = write_bundle(tmp_path / "out", pattern=pattern)
    report = report_on(out)
    (model,) = report["models"]
    assert model["label"] == pattern
    assert len(model["layer_map"]["error"]) == bundles.BLOCKS
    by_name = {figure.name: figure for figure in figures(decode(ModelReport, model))}
    assert by_name["perplexity"].ratio == pytest.approx(16.8 / 10.8)
    assert by_name["decode-1x128"].ratio == 0.9
    assert by_name["ONNX"].dense == 5000
    assert by_name["checkpoint"].ratio == pytest.approx(4000 / 4800)
    text = page_of(report, out)
    assert report["headline"] in text
    assert (f"{pattern} holds in 12 of 12 weights" in text) == (model["widths"] is None)


def test_a_layer_map_has_a_column_for_every_layer_and_one_for_all_experts() -> None:
    def layer(name: str, error: float) -> PrunedLayer:
        return PrunedLayer(
            name=name,
            rows=8,
            cols=8,
            pattern="2:4",
            sparsity=0.5,
            pattern_holds=True,
            relative_error=error,
            damping=0.01,
            solver="thanos",
            failures=(),
            seconds=0.0,
        )

    dense = PrunedBlock((layer("model.layers.0.mlp.down_proj", 0.5),), {})
    routed = PrunedBlock(
        (
            layer("model.layers.1.mlp.experts.0.down_proj", 0.25),
            layer("model.layers.1.mlp.experts.1.down_proj", 0.75),
        ),
        {},
    )
    layers = build._layer_map([dense, routed])
    assert layers.columns == ("mlp.down_proj", "mlp.experts.*.down_proj")
    assert layers.error == ((0.5, None), (None, 0.5))
    assert layers.gone == ((0.5, None), (None, 0.5))
    assert "down_proj (experts)" in charts.layer_maps(layers)


def test_only_the_pruning_has_to_be_done_and_the_rest_is_listed_as_missing(tmp_path: Path) -> None:
    out = write_bundle(tmp_path / "out", stages=("prune",))
    report = report_on(out)
    assert "No engine was built" in page_of(report, out)
    (model,) = report["models"]
    missing = {entry["what"]: entry for entry in model["not_measured"]}
    assert missing["perplexity"]["command"].startswith("thanos-deploy eval")
    assert missing["latency and memory"]["command"].startswith("thanos-deploy bench")
    assert missing["latency and memory on a GPU"]["why"] == "not measured (no GPU)"
    assert "which layers run on sparse kernels" in missing
    assert model["quality"] is None


def test_a_bundle_with_nothing_pruned_is_refused_with_the_command(tmp_path: Path) -> None:
    out = write_bundle(tmp_path / "out", stages=("onnx",))
    with pytest.raises(InputError, match=r"stage 'prune' is not finished\s.*thanos-deploy prune"):
        report_on(out)


@pytest.mark.parametrize("status", ["INVALID", "INTERRUPTED"])
def test_a_run_that_does_not_count_is_shown_loudly(status: str, tmp_path: Path) -> None:
    document = run(status=status, reasons=("the machine moved",))
    report = report_on(write_bundle(tmp_path / "out", runs=(document,)))
    assert any(text.startswith(f"{status}: ") for text in report["notices"])
    assert "the machine moved" in report["notices"][0]
    assert status in report["headline"]
    text = page_of(report, tmp_path / "out")
    assert f'<div class="tile" data-status="{status}">' in text
    assert f"0.900 (0.880 to 0.920), {status}" in text
    assert f"{status}: the timing run" in markdown.render(decode(Report, report))


def test_an_interrupted_run_is_found_though_the_manifest_does_not_have_it(tmp_path: Path) -> None:
    out = write_bundle(tmp_path / "out", stages=("prune", "eval", "onnx"))
    (out / "bench").mkdir()
    document = run("full", status="INTERRUPTED", reasons=("interrupted in round 3 of 12",))
    (out / "bench" / "full.interrupted.json").write_text(json.dumps(document))
    report = report_on(out)
    assert report["models"][0]["bench"][0]["status"] == "INTERRUPTED"
    assert "INTERRUPTED" in report["notices"][0]


def test_a_finished_and_an_interrupted_run_of_one_name_are_told_apart(tmp_path: Path) -> None:
    out = write_bundle(tmp_path / "out", runs=(run("full"),))
    again = run("full", status="INTERRUPTED", kinds=("decode",))
    del again["scenarios"][0]["results"]["pruned"]["ratio"]  # one round has no interval
    (out / "bench" / "full.interrupted.json").write_text(json.dumps(again))
    report = report_on(out)
    model = report["models"][0]
    assert [run["status"] for run in model["bench"]] == ["VALID", "INTERRUPTED"]
    assert len(model["bench"][1]["scenarios"]) == 1
    assert report["headline"].count("x to") == 2
    assert "INTERRUPTED" in page_of(report, out)


def test_an_interrupted_run_may_be_empty(tmp_path: Path) -> None:
    document = {**run(status="INTERRUPTED"), "scenarios": []}
    out = write_bundle(tmp_path / "out", runs=(document,))
    report = report_on(out)
    assert report["models"][0]["quoted_run"] is None
    assert "INTERRUPTED" in page_of(report, out)


def test_a_finished_run_that_the_manifest_does_not_have_does_not_count(tmp_path: Path) -> None:
    out = write_bundle(tmp_path / "out")
    (out / "bench" / "mine.json").write_text(json.dumps(run("mine")))
    report = report_on(out)
    statuses = {run["run"]: run["status"] for run in report["models"][0]["bench"]}
    assert statuses == {"latency": "VALID", "mine": "INVALID"}
    assert "not in the manifest" in report["notices"][0]


def test_a_run_of_another_version_is_refused_and_a_foreign_file_ignored(tmp_path: Path) -> None:
    out = write_bundle(tmp_path / "out")
    (out / "bench" / "notes.json").write_text('{"format": "mine"}')
    assert len(report_on(out)["models"][0]["bench"]) == 1
    newer = {**run("newer"), "format": "thanos-deploy/bench/2"}
    (out / "bench" / "newer.json").write_text(json.dumps(newer))
    with pytest.raises(InputError, match=r"newer\.json: .*format.*thanos-deploy/bench/2"):
        report_on(out)


def test_a_valid_run_speaks_for_a_model_before_a_later_one_that_is_not(tmp_path: Path) -> None:
    runs = (run("full"), run("latency", status="INVALID"), run("aa", baseline="pruned-again"))
    out = write_bundle(tmp_path / "out", runs=runs)
    report = report_on(out)
    assert "Run <q>aa</q>" in page_of(report, out)
    assert report["models"][0]["quoted_run"] == "full"
    assert [run["run"] for run in report["models"][0]["bench"]] == ["full", "latency", "aa"]


def test_every_kind_of_scenario_is_shown(tmp_path: Path) -> None:
    kinds = ("prefill", "decode", "generate", "open-loop")
    out = write_bundle(tmp_path / "out", runs=(run(kinds=kinds),))
    report = report_on(out)
    assert "open-loop-1x128, request" in page_of(report, out)
    names = {figure.name for figure in figures(decode(ModelReport, report["models"][0]))}
    assert "generate-1x128, tokens per second" in names
    assert not any("latency of" in e["what"] for e in report["models"][0]["not_measured"])


def test_a_benchmark_from_before_runs_had_names_is_not_measured(tmp_path: Path) -> None:
    out = write_bundle(tmp_path / "out")
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["stages"]["bench"] |= {"options": {"rounds": 20}, "result": {"subjects": {}}}
    (out / "manifest.json").write_text(json.dumps(manifest))
    (model,) = report_on(out)["models"]
    assert (model["bench"], model["sample"]) == ([], None)
    assert "latency and memory" in [entry["what"] for entry in model["not_measured"]]


def test_stages_of_an_earlier_model_are_left_out(tmp_path: Path) -> None:
    out = write_bundle(tmp_path / "out")
    add_build(out)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["stages"]["prune"]["files"]["model/model.safetensors"]["sha256"] = "d3" * 32
    (out / "manifest.json").write_text(json.dumps(manifest))
    report = report_on(out)
    (model,) = report["models"]
    assert set(model["stale"]) == {"eval", "onnx", "bench", "tensorrt-rtx-sm80"}
    assert (model["quality"], model["export"]) == (None, None)
    assert (model["bench"], model["kernels"], model["sample"]) == ([], [], None)
    assert any("made from an earlier model" in text for text in report["notices"])


def test_what_was_made_of_an_earlier_graph_is_left_out(tmp_path: Path) -> None:
    out = write_bundle(tmp_path / "out")
    add_build(out)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["stages"]["onnx"]["files"]["onnx/model.onnx.data"]["sha256"] = "d3" * 32
    (out / "manifest.json").write_text(json.dumps(manifest))
    (model,) = report_on(out)["models"]
    assert set(model["stale"]) == {"bench", "tensorrt-rtx-sm80"}
    assert model["quality"]["pruned"] == 16.8


def test_a_run_of_a_manifest_that_does_not_say_of_which_graph_is_left_out(tmp_path: Path) -> None:
    out = write_bundle(tmp_path / "out")
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["stages"]["bench"]["inputs"]["latency"]["pruned"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    (model,) = report_on(out)["models"]
    assert model["stale"] == ["bench"]


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("metrics", "prefill-1x128: no times of 'pruned' for 'x'"),
        ("results", "'x' is not one of the models"),
    ],
)
def test_a_run_that_contradicts_itself_is_named(tmp_path: Path, part: str, said: str) -> None:
    document = run()
    results = document["scenarios"][0]["results"]
    if part == "metrics":
        results["pruned"]["ratio"]["x"] = results["pruned"]["ratio"].pop("prefill")
    else:
        results["x"] = results["pruned"]
    out = write_bundle(tmp_path / "out", runs=(document,))
    with pytest.raises(InputError, match=said):
        report_on(out)


def test_what_an_engine_chose_is_the_proof(tmp_path: Path) -> None:
    out = write_bundle(tmp_path / "out")
    add_build(out)
    report = report_on(out)
    (model,) = report["models"]
    assert model["kernels"][0]["summary"]["picked"] == 6
    assert "12 are eligible and 6 were given" in page_of(report, out)
    assert "6 of 12 layers were given a sparse kernel" in markdown.render(decode(Report, report))
    assert not any("sparse kernels" in entry["what"] for entry in model["not_measured"])


def test_a_record_that_was_changed_is_not_believed(tmp_path: Path) -> None:
    out = write_bundle(tmp_path / "out")
    layers = out / "layers.json"
    layers.write_text(layers.read_text().replace("0.01", "0.00"))
    with pytest.raises(IntegrityError, match=r"layers\.json"):
        report_on(out)


def test_a_record_that_is_no_json_is_named(tmp_path: Path) -> None:
    out = write_bundle(tmp_path / "out")
    (out / "bench" / "full.interrupted.json").write_text("{")
    with pytest.raises(InputError, match=r"full\.interrupted\.json: not readable"):
        report_on(out)


def test_several_models_are_compared(tmp_path: Path) -> None:
    report = report_on(
        write_bundle(tmp_path / "a", perplexity=16.8, runs=(run(factor=0.99),)),
        write_bundle(
            tmp_path / "b", pattern="structured:0.2", perplexity=15.0, runs=(run(factor=0.8),)
        ),
        write_bundle(tmp_path / "c", pattern="unstructured:0.5", stages=("prune", "onnx")),
    )
    plots = {plot["cost"]: plot for plot in report["pareto"]}
    assert set(plots) == {"prefill-1x128 time", "decode-1x128 time", "ONNX file", "checkpoint"}
    decode = {point["label"]: point for point in plots["decode-1x128 time"]["points"]}
    assert decode["2:4"]["dominated_by"] == ["dense", "structured:0.2"]
    assert decode["dense"]["dominated_by"] == decode["structured:0.2"]["dominated_by"] == []
    assert plots["decode-1x128 time"]["left_out"] == ["unstructured:0.5"]
    assert report["headline"] == (
        "Worth its loss of quality, because no better model is as cheap: structured:0.2 by "
        "prefill-1x128 time, decode-1x128 time, ONNX file and checkpoint. For 2:4 there is always "
        "a better model that is no more expensive. Not comparable, because the quality or all "
        "costs are missing: unstructured:0.5."
    )


@pytest.mark.slow
def test_a_run_speaks_for_every_bundle_that_was_timed_in_it(tmp_path: Path) -> None:
    """`bench a --against dense --against b` leaves its run in a."""
    b = write_bundle(tmp_path / "b", pattern="4:8", stages=("prune", "eval", "onnx"), bytes_=3900)
    graph = Bundle.open(b).graph_sha256
    document = run("full", others={"b": 0.7}, status="INVALID")
    a = write_bundle(tmp_path / "a", runs=(document,), graphs={"b": graph})
    report = report_on(a, b)
    of_a, of_b = report["models"]
    assert (of_a["quoted_run"], of_b["quoted_run"]) == ("full", "full of a")
    ratios = [
        next(f for f in figures(decode(ModelReport, m)) if f.name == "decode-1x128").ratio
        for m in (of_a, of_b)
    ]
    assert ratios == [0.9, 0.7]
    assert {p["label"] for p in report["pareto"][0]["points"]} == {"dense", "2:4", "4:8"}
    assert "Run <q>full of a</q>" in page_of(report, a, b)
    assert len(report["notices"]) == 1


def test_times_of_runs_that_do_not_count_are_marked_in_a_comparison(tmp_path: Path) -> None:
    report = report_on(
        write_bundle(tmp_path / "a"),
        write_bundle(tmp_path / "b", pattern="4:8", runs=(run(status="INVALID"),)),
    )
    valid = {p["label"]: p["valid"] for p in report["pareto"][0]["points"]}
    assert valid == {"dense": True, "2:4": True, "4:8": False}
    assert "not VALID" in report["headline"]


def test_the_perplexity_of_rounded_weights_is_not_taken_from_the_checkpoint(tmp_path: Path) -> None:
    report = report_on(write_bundle(tmp_path / "a"), write_bundle(tmp_path / "b", dtype="int8"))
    assert [model["label"] for model in report["models"]] == ["2:4 fp32", "2:4 int8"]
    left_out = {plot["cost"]: plot["left_out"] for plot in report["pareto"]}
    assert left_out.pop("checkpoint") == []  # whose weights are not rounded
    assert set(map(tuple, left_out.values())) == {("2:4 int8",)}
    missing = [entry["what"] for entry in report["models"][1]["not_measured"]]
    assert "perplexity of the int8 graph itself" in missing


def test_a_rounded_graph_is_compared_by_its_own_perplexity(tmp_path: Path) -> None:
    a, b = write_bundle(tmp_path / "a"), write_bundle(tmp_path / "b", dtype="int8")
    with manifest.claim(b, Bundle.open(b).source) as bundle:
        inputs = replace(
            bundle.inputs(EVAL),
            onnx=bundle.graph_sha256,
            dense=replace(bundle.result(EVAL), value=10.9),
        )

        def produce(folder: Path) -> TextQuality:
            return replace(bundle.result(EVAL), value=17.3)

        bundle.run(EVAL_ONNX, produce, options=bundle.options(EVAL), inputs=inputs)
    report = report_on(a, b)
    for plot in report["pareto"]:
        found = {point["label"]: point["perplexity"] for point in plot["points"]}
        graph = plot["cost"] != "checkpoint"
        assert found == {"dense": 10.8, "2:4 fp32": 16.8, "2:4 int8": 17.3 if graph else 16.8}
        assert plot["left_out"] == []


def test_bundles_that_look_alike_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    report = report_on(write_bundle(tmp_path / "a"), write_bundle(tmp_path / "b"))
    labels = [model["label"] for model in report["models"]]
    assert [label.split()[-1] for label in labels] == ["a", "b"]


def test_one_bundle_given_twice_is_shown_twice(tmp_path: Path) -> None:
    out = write_bundle(tmp_path / "a")
    labels = [model["label"] for model in report_on(out, out)["models"]]
    assert len(set(labels)) == 2


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        ({"source": replace(bundles.SOURCE, sha256="c2" * 32)}, "different base models"),
        ({"tokenizer": "[]"}, "different tokenizers"),
    ],
)
def test_different_models_are_compared_only_if_that_is_asked_for(
    difference: dict[str, Any], said: str, tmp_path: Path
) -> None:
    paths = (write_bundle(tmp_path / "a"), write_bundle(tmp_path / "b", **difference))
    with pytest.raises(UsageError, match=said):
        report_on(*paths)
    report_on(*paths, allow_different_models=True)


def test_perplexities_of_different_texts_share_no_plot(tmp_path: Path) -> None:
    report = report_on(
        write_bundle(tmp_path / "a"),
        write_bundle(tmp_path / "b", pattern="4:8"),
        write_bundle(tmp_path / "c", pattern="1:4", text="other.txt"),
    )
    assert "different texts" in report["notices"][0]
    assert all(plot["left_out"] == ["1:4"] for plot in report["pareto"])


def test_parts_that_differ_are_refused(tmp_path: Path) -> None:
    """Found by fuzzing."""
    out = write_bundle(tmp_path / "out")
    path = out / "manifest.json"
    path.write_text(path.read_text().replace('"attention"', '"a+ttention"', 1))
    with pytest.raises(InputError, match=r"parts .*a\+ttention"):
        report_on(out)

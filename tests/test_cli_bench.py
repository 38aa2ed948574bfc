"""`thanos-deploy bench` as a user meets it: what is measured, what is kept, what is refused.

The tests read the runs that a few benchmarks have left, so they are in one long file.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from exporters.options import exported_with
from tests.conftest import Invoke
from tests.test_cli import PRUNING
from thanos_deploy import cli
from thanos_deploy.bundle.codec import decode, encode
from thanos_deploy.bundle.manifest import Bundle, claim
from thanos_deploy.gpu import nvml
from thanos_deploy.machine import stillness
from thanos_deploy.measure import gates, paired
from thanos_deploy.measure.options import EvalRequest
from thanos_deploy.measure.run import Run
from thanos_deploy.pattern import SemiStructured
from thanos_deploy.progress import quietly
from thanos_deploy.stages.dense import Dense
from thanos_deploy.stages.evaluate import evaluate
from thanos_deploy.stages.export import export, export_dense
from thanos_deploy.stages.prune import prune
from thanos_deploy.stages.request import PruneRequest

pytestmark = pytest.mark.slow

QUICK = ("--prompt", "8", "--new-tokens", "3", "--rounds", "2", "--requests", "2", "-q")
PREFILL = (*QUICK, "--scenario", "prefill")


def make_bundle(model: Path, out: Path) -> Path:
    """A bundle that is ready to be measured, and its dense model in the cache."""
    dense = Dense(str(model))
    request = PruneRequest.of(SemiStructured(2, 4), nsamples=4, seqlen=64, block_size=16)
    with claim(out, dense.source) as bundle:
        prune(bundle, dense, request)
        export(bundle)
        evaluate(bundle, dense, EvalRequest(segments=2, seqlen=64))
        export_dense(dense, exported_with(bundle), quietly)
    return out


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle and a cache with its dense model. Not to be changed."""
    cache = tmp_path_factory.mktemp("bench-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THANOS_DEPLOY_CACHE", str(cache))
        return make_bundle(tiny_llama, tmp_path_factory.mktemp("bench") / "out"), cache


@pytest.fixture
def out(made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the bundle."""
    monkeypatch.setenv("THANOS_DEPLOY_CACHE", str(made[1]))
    return Path(shutil.copytree(made[0], tmp_path / "out"))


def run_of(out: Path, name: str) -> dict[str, Any]:
    run: dict[str, Any] = json.loads((out / "bench" / f"{name}.json").read_text())
    return run


@pytest.mark.parametrize("driver", ["poisson", "loadgen"])
def test_every_scenario_is_measured_beside_the_dense_model(
    out: Path, invoke: Invoke, driver: str
) -> None:
    if driver == "loadgen":
        pytest.importorskip("mlperf_loadgen", reason="MLPerf LoadGen is not installed")
    code, printed, errors = invoke("bench", out, *QUICK, "--driver", driver, "--json")
    assert code == 0, errors
    run = run_of(out, "full")
    assert json.loads(printed) == {**encode(decode(Run, run).without_samples), "gates": []}
    names = [scenario["name"] for scenario in run["scenarios"]]
    assert names == ["prefill-1x8", "decode-1x8", "generate-1x8+3", "open-loop-1x8+3"]
    counts = {"prefill": 2, "decode": 6, "ttft": 2, "inter_token": 4, "total": 2}
    counts |= {"tokens_per_second": 2, "request": 4}
    for scenario in run["scenarios"]:
        assert list(scenario["results"]) == ["dense", "pruned"]
        for label, result in scenario["results"].items():
            for metric, measured in result["metrics"].items():
                open_loop = scenario["kind"] == "open-loop"
                expected = 4 if open_loop else counts[metric]
                assert len(measured["samples"]) == measured["count"] == expected
                assert 0 < measured["median"] <= measured["p90"] <= measured["p99"]
            assert ("ratio" in result) == (label != "dense")
            assert (result["of_ceiling"] is None) == (scenario["kind"] == "open-loop")
        ratio = scenario["results"]["pruned"]["ratio"][scenario["headline"]]
        assert ratio["low"] <= ratio["estimate"] <= ratio["high"]
    load = run["scenarios"][-1]
    assert load["offered_per_second"] > 0
    assert load["results"]["pruned"]["achieved_per_second"] > 0
    assert run["status"] in ("VALID", "INVALID")
    assert (run["status"] == "VALID") == (run["reasons"] == [])
    assert run["gpu"] is None
    for facts in run["subjects"].values():
        assert facts["gpu_peak_bytes"] is None
        assert 0 < facts["load_peak_bytes"] <= facts["peak_bytes"]
    bundle = Bundle.open(out)
    bundle.verify()
    assert "report" in bundle.stages


def test_the_table_has_every_model_and_says_what_was_not_measured(
    out: Path, invoke: Invoke
) -> None:
    code, printed, _ = invoke("bench", out, *QUICK, "--batch", "1,2", "--batch", "3")
    assert code == 0
    for part in (
        *("prefill-3x8, ms", "decode-2x8, ms", "generate-1x8+3", "tokens per second", "request"),
        *("dense", "pruned", "file, MB", "steady, MB", "KV cache, kB/token", "ceiling: memory"),
        *("not measured (no GPU)", "VALID", "offered"),
    ):
        assert part in printed, part


def test_repeating_a_run_measures_nothing_and_runs_of_other_names_stay(
    out: Path, invoke: Invoke
) -> None:
    assert invoke("bench", out, *PREFILL)[0] == 0
    first = (out / "bench" / "full.json").read_bytes()
    assert invoke("bench", out, *PREFILL)[0] == 0
    assert invoke("bench", out, *PREFILL, "--run", "wide", "--batch", "4")[0] == 0
    assert (out / "bench" / "full.json").read_bytes() == first
    bundle = Bundle.open(out)
    bundle.verify()
    assert list(bundle.stages["bench"].result["runs"]) == ["full", "wide"]
    code, _, errors = invoke("bench", out, *PREFILL, "--batch", "2")
    assert code == 2
    assert "run 'full' was made with other options: batches was [1] and is now [2]" in errors
    assert invoke("bench", out, *PREFILL, "--batch", "2", "--overwrite")[0] == 0
    assert list(Bundle.open(out).stages["bench"].result["runs"]) == ["wide", "full"]


def test_a_changed_run_is_not_passed_on_as_measured(out: Path, invoke: Invoke) -> None:
    assert invoke("bench", out, *PREFILL)[0] == 0
    path = out / "bench" / "full.json"
    path.write_text(path.read_text().replace('"VALID"', '"INVALID"') + " ")
    assert invoke("bench", out, *PREFILL)[0] == 7
    assert invoke("bench", out, *PREFILL, "--run", "other")[0] == 7


@pytest.mark.parametrize("slower", [1.0, 1.5])
def test_a_run_of_a_model_against_itself_shows_the_difference_that_there_is(
    out: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, slower: float
) -> None:
    # Seconds of the rounds: of both the same ones in another order, so that the medians are equal
    # but for the factor, and no round's pair is.
    seconds = [0.9, 1.1, 1.02, 0.95, 1.06, 0.98, 1.04, 0.93, 1.0, 1.08, 0.97, 1.01]
    rounds = {"pruned": seconds, "pruned-again": [slower * one for one in seconds[::-1]]}
    take_turns = paired.Engines.take_turns

    def clocked(self: paired.Engines, scenarios: Any, number: int) -> paired.Round:
        taken = take_turns(self, scenarios, number)
        return {
            name: {label: {"prefill": [rounds[label][number]]} for label in of_scenario}
            for name, of_scenario in taken.items()
        }

    monkeypatch.setattr(paired.Engines, "take_turns", clocked)
    code, _, errors = invoke("bench", out, *PREFILL, "--rounds", "12", "--aa")
    assert code == 0, errors
    run = run_of(out, "aa")
    assert list(run["subjects"]) == ["pruned", "pruned-again"]
    (scenario,) = run["scenarios"]
    again = scenario["results"]["pruned-again"]
    assert again["metrics"]["prefill"]["samples"] == rounds["pruned-again"]
    found = again["ratio"]["prefill"]
    assert found["estimate"] == pytest.approx(slower)
    assert found["low"] < slower < found["high"]
    differences = [reason for reason in run["reasons"] if "that of the same model" in reason]
    if slower == 1.0:
        assert found["low"] < 1.0 < found["high"]
        assert not differences
    else:
        assert run["status"] == "INVALID"
        assert differences == [
            f"prefill-1x8: prefill of pruned-again is 1.500 ({found['low']:.3f} to "
            f"{found['high']:.3f}) times that of the same model, and the interval should contain 1"
        ]


def test_a_model_is_not_measured_against_itself_and_another_one(out: Path, invoke: Invoke) -> None:
    assert invoke("bench", out, "--aa", "--against", "dense")[0] == 2


def test_load_by_others_makes_a_run_invalid(
    out: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stillness, "_MOST_OTHER_LOAD", -1.0)
    code, printed, _ = invoke("bench", out, *PREFILL, "--gate", "prefill.p50.ratio<1000")
    assert code == 6
    assert "INVALID" in printed
    assert "other processes used" in printed
    assert "MISSED (the run is INVALID)" in printed
    assert run_of(out, "full")["status"] == "INVALID"


def test_a_baseline_that_drifts_makes_a_run_invalid(
    out: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_turns = paired.Engines.take_turns

    def slowing(self: paired.Engines, scenarios: Any, number: int) -> paired.Round:
        taken = take_turns(self, scenarios, number)
        for samples in taken["prefill-1x8"].values():
            samples["prefill"] = [1.0 + number / 20]
        return taken

    monkeypatch.setattr(paired.Engines, "take_turns", slowing)
    arguments = ("--prompt", "8", "--rounds", "12", "--scenario", "prefill", "-q")
    assert invoke("bench", out, *arguments)[0] == 0
    reasons = run_of(out, "full")["reasons"]
    assert any(reason.startswith("prefill-1x8: dense drifted by +") for reason in reasons)


class SharedGpu:
    """A GPU as NVML shows it, with a stranger that comes when the models are loaded."""

    name = "a GPU"

    def __init__(self, own: dict[str, int], stranger: int | None) -> None:
        self.own = own
        self.stranger = stranger

    def read(self) -> nvml.Reading:
        ours = {number: 100 for number in self.own.values()}
        others = [self.stranger] if ours and self.stranger else []
        used = 1000 + sum(ours.values())
        return nvml.Reading(1.5e9, 300.0, (), ours, (*ours, *others), used, 0.0)


@pytest.mark.parametrize("stranger", [None, 4711])
def test_a_gpu_that_others_use_makes_a_run_invalid(
    out: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, stranger: int | None
) -> None:
    """The engines are those of the CPU, in processes that the GPU is said to have."""
    opened, own = paired.opened, dict[str, int]()

    @contextmanager
    def on_cpu(paths: Any, *, provider: str, threads: int) -> Iterator[paired.Engines]:
        with opened(paths, provider="cpu", threads=threads) as engines:
            own.update(engines.processes)
            yield engines

    monkeypatch.setattr(paired, "opened", on_cpu)
    monkeypatch.setattr(nvml.Monitor, "probe", lambda: SharedGpu(own, stranger))
    assert invoke("bench", out, *PREFILL, "--provider", "cuda")[0] == 0
    run = run_of(out, "full")
    reasons = [reason for reason in run["reasons"] if "used the GPU" in reason]
    assert reasons == (["during the run, process 4711 used the GPU"] if stranger else [])
    assert {facts["gpu_peak_bytes"] for facts in run["subjects"].values()} == {100}
    assert run["gpu"]["memory_of_all_models"] == {"bytes": 200, "by": "process"}


def test_counters_that_cannot_be_read_are_null(
    out: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(path: Path) -> None:
        return None

    monkeypatch.setattr(stillness, "_text", unreadable)
    assert invoke("bench", out, *PREFILL)[0] == 0
    run = run_of(out, "full")
    for name in ("other_load", "stolen", "clock_hz", "throttle_events"):
        assert run["machine"][name] is None
    assert run["environment"]["governor"] is None
    assert run["environment"]["cpu_flags"] == []


def test_gates_decide_the_exit_code_and_are_all_listed(out: Path, invoke: Invoke) -> None:
    held, missed = "file_bytes.ratio<=1.01", "ppl.ratio<0.5"
    assert invoke("bench", out, *PREFILL, "--gate", held)[0] == 0
    code, printed, errors = invoke(
        "bench", out, *PREFILL, "--gate", held, "--gate", missed, "--json"
    )
    assert code == 6
    outcomes = {one["gate"]: one for one in json.loads(printed)["gates"]}
    assert outcomes[held]["held"] is True
    assert outcomes[missed]["held"] is False
    own, dense = (
        Bundle.open(out).stages["eval"].result["value"],
        Bundle.open(out).stages["eval"].inputs["dense"]["value"],
    )
    assert outcomes[missed]["value"] == pytest.approx(own / dense)
    for part in (f"{held}: ", f"{missed}: ", "held", "MISSED"):
        assert part in errors


def test_help_names_everything_that_a_gate_can_be_on(invoke: Invoke) -> None:
    _, printed, _ = invoke("bench", "--help")
    for name in (*gates.METRICS, *gates.FIGURES, *gates.STATISTICS, *gates.QUALITIES):
        assert name in printed, name


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--gate", "speed<1"), 2, "no measurement is called 'speed'"),
        (("--gate", "decode.p50<1"), 2, "this run does not measure decode"),
        (("--prompt", "1,0"), 2, "is not a list of positive integers"),
        (
            ("--prompt", "200"),
            2,
            "scenario prefill-1x200: 200 tokens are needed, and the model takes 128",
        ),
        (("--run", "../x"), 2, "not a valid name for a run"),
        (("--against", "nowhere"), 3, "not a bundle"),
        (("--provider", "cuda"), 4, "no GPU"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(
    out: Path, invoke: Invoke, arguments: tuple[str, ...], code: int, message: str
) -> None:
    status, printed, errors = invoke("bench", out, *PREFILL, *arguments)
    assert (status, printed) == (code, "")
    assert message in errors
    assert "Traceback" not in errors
    assert not (out / "bench").exists()


def test_a_driver_that_is_not_installed_is_refused_before_anything_is_measured(
    out: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    code, _, errors = invoke("bench", out, *QUICK, "--driver", "loadgen")
    assert code == 4
    assert "pip install 'thanos-deploy[loadgen]'" in errors
    assert not (out / "bench").exists()


def test_a_missing_baseline_is_refused_with_what_would_help(
    out: Path,
    tiny_llama: Path,
    tmp_path: Path,
    invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("THANOS_DEPLOY_CACHE", str(tmp_path / "empty"))
    code, _, errors = invoke("bench", out, *PREFILL)
    assert code == 3
    assert "no export of" in errors
    assert "--dense MODEL" in errors
    assert invoke("bench", out, *PREFILL, "--dense", tiny_llama)[0] == 0
    assert list(run_of(out, "full")["subjects"]) == ["dense", "pruned"]


def test_a_bundle_without_a_graph_is_refused(
    out: Path, tiny_llama: Path, tmp_path: Path, invoke: Invoke
) -> None:
    bare = tmp_path / "bare"
    assert invoke("prune", tiny_llama, *PRUNING, "-o", bare, "-q")[0] == 0
    for arguments in ((bare,), (out, "--against", bare)):
        code, _, errors = invoke("bench", *arguments, *PREFILL)
        assert code == 3
        assert "stage 'onnx' is not finished" in errors


def test_bundles_are_compared_with_the_first_that_is_named(
    out: Path, tmp_path: Path, invoke: Invoke
) -> None:
    other = Path(shutil.copytree(out, tmp_path / "other"))
    against = ("--against", other, "--against", "dense")
    code, _, errors = invoke("bench", out, *PREFILL, *against)
    assert code == 0, errors
    run = run_of(out, "full")
    assert run["baseline"] == "other"
    assert list(run["subjects"]) == ["other", "pruned", "dense"]
    for wrong in (out, other, "dense"):
        code, _, errors = invoke("bench", out, *PREFILL, *against, "--against", wrong)
        assert code == 2
        assert "the same model is named twice, or two models have the name" in errors


def other_bundle(out: Path, *keys: str) -> Path:
    """A copy whose manifest has another hash in some place."""
    other = Path(shutil.copytree(out, out.parent / "other"))
    manifest = json.loads((other / "manifest.json").read_text())
    place = manifest
    for key in keys:
        place = place[key]
    place["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    return other


@pytest.mark.parametrize(
    ("what", "keys"),
    [
        ("base model", ("source",)),
        ("tokenizer", ("stages", "prune", "files", "model/tokenizer.json")),
    ],
)
def test_bundles_of_other_models_are_refused_unless_asked_for(
    out: Path, invoke: Invoke, what: str, keys: tuple[str, ...]
) -> None:
    different = ("--against", other_bundle(out, *keys))
    code, _, errors = invoke("bench", out, *PREFILL, *different)
    assert code == 2
    assert f"whose {what} is not that of" in errors
    assert not (out / "bench").exists()
    assert invoke("bench", out, *PREFILL, *different, "--allow-different-models")[0] == 0
    assert run_of(out, "full")["baseline"] == "other"


def test_an_interrupted_run_keeps_its_samples_and_the_next_one_starts_over(
    out: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_turns = paired.Engines.take_turns

    def interrupted(self: paired.Engines, scenarios: Any, number: int) -> paired.Round:
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C does
        return take_turns(self, scenarios, number)

    # A shell that starts the tests in the background lets them ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(paired.Engines, "take_turns", interrupted)
            code, printed, errors = invoke("bench", out, *PREFILL, "--rounds", "5")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (code, printed) == (cli.INTERRUPTED, "")
    assert "repeat the command" in errors
    kept = run_of(out, "full.interrupted")
    assert kept["status"] == "INTERRUPTED"
    assert kept["reasons"][0] == "interrupted after 3 of 5 rounds"
    samples = kept["scenarios"][0]["results"]["pruned"]["metrics"]["prefill"]["samples"]
    assert len(samples) == kept["rounds"] == 3
    assert "bench" not in Bundle.open(out).stages
    assert invoke("bench", out, *PREFILL)[0] == 0
    assert sorted(path.name for path in (out / "bench").iterdir()) == ["full.json", "sample.json"]
    assert run_of(out, "full")["rounds"] == 2


def test_a_process_that_dies_while_it_is_measured_is_an_error(
    out: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_turns = paired.Engines.take_turns

    def killing(self: paired.Engines, scenarios: Any, number: int) -> paired.Round:
        os.kill(self.processes["pruned"], signal.SIGKILL)
        return take_turns(self, scenarios, number)

    monkeypatch.setattr(paired.Engines, "take_turns", killing)
    code, _, errors = invoke("bench", out, *PREFILL)
    assert code == 4
    assert f"ended with status {-signal.SIGKILL}" in errors
    assert not (out / "bench").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="what is read is Linux's")
def test_what_is_known_of_the_machine_is_recorded(out: Path, invoke: Invoke) -> None:
    assert invoke("bench", out, *PREFILL, "--threads", "1")[0] == 0
    run = run_of(out, "full")
    assert run["environment"]["threads"] == 1
    assert run["machine"]["other_load"] is not None
    assert run["machine"]["memory_bandwidth_bytes_per_second"] > 0
    assert run["environment"]["libraries"]["scipy"]

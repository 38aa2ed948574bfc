"""The command as a user meets it: outcomes, exit codes, what is left on disk.

The commands are tried on the same few bundles, so this file is longer than others.
"""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.bundles import checked
from tests.commands import COMMAND, Command
from tests.conftest import Invoke, stock_model
from tests.presets import TUNE_STEPS
from thanos_deploy import cli
from thanos_deploy.bundle.files import sha256
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.model.load import load_tokenizer
from thanos_deploy.report.escape import literal
from thanos_deploy.stages import pipeline
from thanos_deploy.stages import prune as pruning
from thanos_deploy.stages.dense import Dense
from thanos_deploy.stages.texts import open_text

# Little enough for a two-block model to take a second a stage.
TUNING = ("--tune-steps", str(TUNE_STEPS), "--tune-nsamples", "0")
PRUNING = (
    *("--pattern", "2:4", "--nsamples", "4", "--seqlen", "64", "--block-size", "16"),
    *TUNING,
)
JUDGING = ("--eval-segments", "2", "--eval-seqlen", "64")
TIMING = ("--prompt", "8", "--new-tokens", "4", "--rounds", "2")
SMALL = (*PRUNING, *JUDGING, *TIMING)


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A finished run of the real command: bundle, cache, standard output."""
    out = tmp_path_factory.mktemp("finished") / "out"
    cache = tmp_path_factory.mktemp("finished-cache")
    done = subprocess.run(
        [COMMAND, "prune-export", tiny_llama, *SMALL, "--target", "onnx", "-o", out, "--json"],
        env={**os.environ, "THANOS_DEPLOY_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out, cache, done.stdout


def test_one_command_makes_the_whole_bundle(finished: tuple[Path, Path, str]) -> None:
    out, _, printed = finished
    for name in (
        *("manifest.json", "README.md", "layers.json", "model/model.safetensors"),
        *("model/config.json", "model/tokenizer.json", "onnx/model.onnx", "onnx/export.json"),
        *("eval/perplexity.json", "bench/latency.json", "report/report.json"),
        *("report/index.html", "report/report.md"),
    ):
        assert (out / name).is_file(), name
    bundle = Bundle.open(out)
    assert tuple(bundle.stages) == pipeline.STAGES
    bundle.verify()
    on_disk = {name for name in files(out) if name not in ("manifest.json", ".lock")}
    assert on_disk == {name for record in bundle.stages.values() for name in record.files}
    assert json.loads(printed) == json.loads((out / "report" / "report.json").read_text())


def test_the_report_says_what_was_measured(finished: tuple[Path, Path, str]) -> None:
    out, _, printed = finished
    (report,) = checked(json.loads(printed))["models"]
    (run,) = report["bench"]
    raw = json.loads((out / "bench" / "latency.json").read_text())
    assert [scenario["name"] for scenario in raw["scenarios"]] == ["prefill-1x8", "decode-1x8"]
    for label in ("dense", "pruned"):
        for scenario, count in zip(raw["scenarios"], (2, 8), strict=True):
            what = scenario["kind"]
            samples = scenario["results"][label]["metrics"][what]["samples"]
            assert len(samples) == count
            (shown,) = (one for one in run["scenarios"] if one["name"] == scenario["name"])
            summary = shown["results"][label]["metrics"][what]
            for figure, percent in (("median", 50), ("p90", 90), ("p99", 99)):
                expected = np.percentile(samples, percent)
                assert summary[figure] == pytest.approx(float(expected))
    assert run["subjects"] == raw["subjects"]
    notices = json.loads(printed)["notices"]
    assert bool(raw["reasons"]) == any("INVALID" in notice for notice in notices)
    weights = (out / "model" / "model.safetensors").stat().st_size
    assert report["bytes"]["model"]["pruned"] == weights
    assert report["linear_layers"]["sparsity"] == 0.5
    assert report["linear_layers"]["pattern_holds"] is True
    missing = {entry["what"]: entry["why"] for entry in report["not_measured"]}
    assert missing["latency and memory on a GPU"] == "not measured (no GPU)"
    assert any("2:4 brings no speed on a CPU" in sentence for sentence in report["verdict"])
    assert any("compute capability 8.0" in sentence for sentence in report["verdict"])


def test_the_model_card_quotes_the_report(finished: tuple[Path, Path, str]) -> None:
    out, _, printed = finished
    card, (report,) = (out / "README.md").read_text(), json.loads(printed)["models"]
    for who in ("dense", "pruned"):
        assert f"{report['quality'][who]:.2f}" in card
    for sentence in report["verdict"]:
        assert literal(sentence) in card


def test_the_pruned_perplexity_is_that_of_the_files(
    finished: tuple[Path, Path, str], tiny_llama: Path
) -> None:
    out, _, printed = finished
    quality = json.loads(printed)["models"][0]["quality"]
    for label, folder in (("dense", tiny_llama), ("pruned", out / "model")):
        model = stock_model(folder, dtype=torch.float32)
        text = open_text("builtin", "text", held_out=True)
        tokenizer = load_tokenizer(folder)
        ids = torch.tensor(tokenizer(text.content[:200])["input_ids"][:128]).reshape(2, 64)
        with torch.no_grad():
            loss = sum(model(row[None], labels=row[None]).loss for row in ids) / 2
        assert quality[label] == pytest.approx(loss.exp().item(), rel=1e-5)


def test_nothing_in_a_bundle_names_a_path_of_this_machine(
    finished: tuple[Path, Path, str], tiny_llama: Path
) -> None:
    out, _, _ = finished
    for path in out.rglob("*.json"):
        content = path.read_text()
        assert str(out.parent) not in content, path
        assert str(tiny_llama.parent) not in content, path


def test_the_same_command_again_does_no_work_twice(
    finished: tuple[Path, Path, str],
    tiny_llama: Path,
    invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, cache, printed = finished
    monkeypatch.setenv("THANOS_DEPLOY_CACHE", str(cache))
    before = (files(out), files(cache))
    code, output, errors = invoke("prune-export", tiny_llama, *SMALL, "-o", out, "--json")
    assert (code, errors) == (0, "")
    assert json.loads(output) == json.loads(printed)
    assert (files(out), files(cache)) == before


def test_the_table_has_every_figure(
    finished: tuple[Path, Path, str],
    tiny_llama: Path,
    invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, cache, _ = finished
    monkeypatch.setenv("THANOS_DEPLOY_CACHE", str(cache))
    code, output, _ = invoke("prune-export", tiny_llama, *SMALL, "-o", out)
    assert code == 0
    for figure in (
        *("perplexity", "checkpoint, MB", "ONNX, MB", "prefill-1x8, ms", "decode-1x8, ms"),
        *("peak memory", "ONNX against PyTorch", "not measured (no GPU)", "brings no speed"),
    ):
        assert figure in output, figure


@pytest.mark.slow
def test_the_stages_one_by_one_make_the_same_bundle(
    finished: tuple[Path, Path, str], tiny_llama: Path, tmp_path: Path, invoke: Invoke
) -> None:
    whole, _, _ = finished
    out = tmp_path / "out"
    code, _, errors = invoke("bench", out, "--dense", tiny_llama)
    assert code == 3
    assert "not a bundle" in errors
    assert not out.exists()
    assert invoke("prune", tiny_llama, *PRUNING, "-o", out)[0] == 0
    code, _, errors = invoke("bench", out, "--dense", tiny_llama)
    assert code == 3
    assert "stage 'onnx' is not finished" in errors
    assert invoke("export", out, "--target", "onnx")[0] == 0
    assert invoke("eval", out, "--dense", tiny_llama, *JUDGING)[0] == 0
    timing = ("--scenario", "prefill", "--scenario", "decode", *TIMING)
    assert invoke("bench", out, "--dense", tiny_llama, *timing)[0] == 0
    for name in ("model/model.safetensors", "onnx/model.onnx", "onnx/model.onnx.data"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert tuple(sorted(Bundle.open(out).stages)) == tuple(sorted(pipeline.STAGES))


@pytest.mark.slow
def test_a_dry_run_checks_everything_and_writes_nothing(
    tiny_llama: Path, tmp_path: Path, invoke: Invoke
) -> None:
    arguments = ("prune-export", tiny_llama, *SMALL, "-o", tmp_path / "out", "--dry-run", "--json")
    code, output, _ = invoke(*arguments)
    assert code == 0
    plan = json.loads(output)
    weights = 2 * (32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 48)
    assert plan["linear_weights"] == weights
    assert plan["linear_weights_removed"] == weights // 2
    assert set(plan["stages"].values()) == {"to do"}
    assert not (tmp_path / "out").exists()
    assert invoke(*arguments, "--seqlen", "4096")[0] == 2


def damage(model: Path, how: str) -> None:
    weights = model / "model.safetensors"
    tensors = load_file(weights)
    match how:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "nan":
            tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] = float("nan")
            save_file(tensors, weights, metadata={"format": "pt"})
        case "type":
            config = json.loads((model / "config.json").read_text())
            (model / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
        case "shape":
            tensors["model.norm.weight"] = torch.ones(31)
            save_file(tensors, weights, metadata={"format": "pt"})
        case "tokenizer":
            (model / "tokenizer.json").write_text("{")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "model.safetensors: not a readable safetensors file"),
        ("nan", "1 of 1024 entries of model.layers.1.self_attn.o_proj.weight are NaN"),
        ("type", "model type 'mamba' is not supported"),
        ("shape", "model.norm.weight has shape (31,), config.json says (32,)"),
        ("tokenizer", "no tokenizer that can be loaded"),
    ],
)
def test_a_damaged_model_exits_3_with_the_place_named_and_nothing_half_written(
    model: Path, tmp_path: Path, invoke: Invoke, how: str, message: str
) -> None:
    damage(model, how)
    code, output, errors = invoke("prune-export", model, *SMALL, "-o", tmp_path / "out")
    assert (code, output) == (3, "")
    assert message in errors
    assert "What to do: " in errors
    assert "Traceback" not in errors
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--pattern", "2:5x"], 2, "pattern '2:5x' is not understood"),
        (["--pattern", "5:4"], 2, "keeps 5 of every 4"),
        (["--pattern", "0:4"], 2, "keeps 0 of every 4"),
        (["--method", "wanda"], 2, "method wanda has no option --block-size"),
        (["--score", "guess"], 2, "'guess' is not one of"),
        (["--damp-mode", "guess"], 2, "'guess' is not one of"),
        (["--pattern", "3:5", "--block-size", "20"], 3, "32 inputs do not divide into the groups"),
        (["--block-size", "6"], 2, "blocks of 6 columns"),
        (["--damp", "0"], 2, "0.0 is not in the range x>0.0"),
        (["--dense-target", "1.5"], 2, "1.5 is not in the range"),
        (["--tune-steps", "-1"], 2, "-1 is not in the range"),
        (["--method", "guess"], 2, "'guess'"),
        (["--target", "telepathy"], 2, "'telepathy'"),
        (["--seqlen", "4096"], 2, "segments of 4096 tokens"),
        (["--prompt", "4096"], 2, "4100 tokens are needed, and the model takes 128"),
        (["--nsamples", "100000"], 3, "tokens found, and 6400000 needed"),
        (["--nsamples", "0"], 2, "0 segments"),
        (["--calib", "/no/such.txt"], 3, "/no/such.txt: cannot be read"),
        (["--eval-text", "/no/such.txt"], 3, "/no/such.txt: cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_done_is_refused_before_any_work(
    tiny_llama: Path,
    tmp_path: Path,
    invoke: Invoke,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    out = tmp_path / "out"
    actual, output, errors = invoke("prune-export", tiny_llama, *SMALL, *arguments, "-o", out)
    assert (actual, output) == (code, ""), errors
    assert message in errors
    assert not out.exists() or [path.name for path in out.iterdir()] == [".lock"]


def test_evaluating_on_the_calibration_text_is_refused(
    tiny_llama: Path, tmp_path: Path, invoke: Invoke
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the same words for both. " * 100)
    code, _, errors = invoke(
        "prune-export",
        tiny_llama,
        *SMALL,
        "-o",
        tmp_path / "out",
        "--calib",
        text,
        "--eval-text",
        text,
    )
    assert code == 2
    assert "the model was calibrated on this text" in errors


@pytest.mark.slow
def test_a_folder_made_with_other_options_is_kept_unless_overwritten(
    finished: tuple[Path, Path, str], tiny_llama: Path, tmp_path: Path, invoke: Invoke
) -> None:
    out = Path(shutil.copytree(finished[0], tmp_path / "out"))
    before = files(out)
    code, _, errors = invoke("prune-export", tiny_llama, *SMALL, "--seed", "1", "-o", out)
    assert code == 2
    assert "seed was 0 and is now 1" in errors
    assert files(out) == before
    code, _, _ = invoke("prune-export", tiny_llama, *SMALL, "--seed", "1", "-o", out, "--overwrite")
    assert code == 0
    assert Bundle.open(out).stages["prune"].options["seed"] == 1
    Bundle.open(out).verify()


def test_a_changed_file_exits_7(
    finished: tuple[Path, Path, str], tiny_llama: Path, tmp_path: Path, invoke: Invoke
) -> None:
    out = Path(shutil.copytree(finished[0], tmp_path / "out"))
    weights = out / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, _, errors = invoke("prune-export", tiny_llama, *SMALL, "-o", out)
    assert code == 7
    assert "model.safetensors" in errors


def test_a_foreign_folder_is_not_touched(tiny_llama: Path, tmp_path: Path, invoke: Invoke) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    code, _, errors = invoke("prune-export", tiny_llama, *SMALL, "-o", tmp_path, "--overwrite")
    assert code == 2
    assert "nothing was changed there" in errors
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_full_disk_exits_5_and_the_rerun_succeeds(
    tiny_llama: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("prune", tiny_llama, *PRUNING, "-o", tmp_path / "out")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        code, _, errors = invoke(*arguments)
    assert code == 5
    assert "no space left" in errors
    assert invoke(*arguments)[0] == 0


def test_a_place_that_cannot_be_written_to_exits_4(
    tiny_llama: Path, tmp_path: Path, invoke: Invoke
) -> None:
    (tmp_path / "file").write_text("not a folder")
    code, _, errors = invoke("prune", tiny_llama, *PRUNING, "-o", tmp_path / "file" / "out")
    assert code == 4
    assert "Not a directory" in errors


def test_a_bug_exits_1_and_keeps_its_traceback(
    tiny_llama: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> Any:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(pruning, "prune", broken)
    code, _, errors = invoke("prune", tiny_llama, "--pattern", "2:4", "-o", tmp_path / "out")
    assert code == 1
    assert "ZeroDivisionError: oops" in errors
    assert "this is a bug" in errors


def test_help_answers_without_importing_torch() -> None:
    code = (
        "import sys\nfrom thanos_deploy.cli import cli\n"
        "cli.main(['prune-export', '--help'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'onnx'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--pattern" in done.stdout


def start(model: Path, out: Path, cache: Path) -> Command:
    """The whole command, forked."""
    return Command(
        "prune-export",
        model,
        *SMALL,
        "-o",
        out,
        environment={"THANOS_DEPLOY_CACHE": str(cache)},
    )


def start_program(model: Path, out: Path, cache: Path) -> "subprocess.Popen[bytes]":
    """The whole command, as the program that is installed."""
    return subprocess.Popen(
        [COMMAND, "prune-export", model, *SMALL, "-o", out],
        env={**os.environ, "THANOS_DEPLOY_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # A shell's background job inherits an ignored Ctrl-C, and so would the command.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(folder: Path, pattern: str, process: "Command | subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{pattern} never appeared"
        time.sleep(0.002)


# What there is to see on disk while each stage is under way.
UNDER_WAY = {
    "prune": "out/.partial-prune",
    "dense eval": "cache/*/.partial-eval-dense",
    "eval": "out/.partial-eval",
    "onnx": "out/.partial-onnx",
    "dense onnx": "cache/*/.partial-onnx",
    "bench": "out/.partial-bench",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("begin", "how", "stage"),
    [
        *((start, signal.SIGKILL, stage) for stage in UNDER_WAY),
        (start_program, signal.SIGINT, "prune"),
        (start, signal.SIGINT, "bench"),
        (start, signal.SIGTERM, "onnx"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_interrupted_in_any_stage_the_same_command_resumes(
    finished: tuple[Path, Path, str],
    tiny_llama: Path,
    tmp_path: Path,
    begin: "Callable[[Path, Path, Path], Command | subprocess.Popen[bytes]]",
    how: signal.Signals,
    stage: str,
) -> None:
    whole, _, _ = finished
    out, cache = tmp_path / "out", tmp_path / "cache"
    cache.mkdir()
    process = begin(tiny_llama, out, cache)
    wait_for(tmp_path, UNDER_WAY[stage], process)
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal does: to the measuring processes as well
    else:
        process.send_signal(how)
    _, errors = process.communicate()
    if how == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == cli.INTERRUPTED, errors.decode()
        assert b"repeat the command" in errors
        assert b"Traceback" not in errors
    done = Bundle.open(out).stages if (out / "manifest.json").exists() else {}
    finished_before = {name: record.finished for name, record in done.items()}
    again = start(tiny_llama, out, cache)
    _, errors = again.communicate()
    assert again.returncode == 0, errors.decode()
    bundle = Bundle.open(out)
    bundle.verify()
    assert tuple(bundle.stages) == pipeline.STAGES
    for name, when in finished_before.items():
        assert bundle.stages[name].finished == when, f"{name} was done twice"
    for name in ("model/model.safetensors", "onnx/model.onnx", "onnx/model.onnx.data"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_a_second_process_on_the_same_folder_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    first = start(tiny_llama, out, cache)
    wait_for(out, ".lock-owner", first)
    second = start(tiny_llama, out, cache)
    _, errors = second.communicate()
    first.kill()
    first.communicate()
    assert second.returncode == 4
    assert f"another process ({first.pid} on ".encode() in errors


def test_generate_streams_what_the_exported_model_says(
    finished: tuple[Path, Path, str], invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _, _ = finished
    model, tokenizer = (
        stock_model(out / "model", dtype=torch.float32),
        load_tokenizer(out / "model"),
    )
    ids = tokenizer("Once", return_tensors="pt")["input_ids"]
    answer = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    expected = str(tokenizer.decode(answer, skip_special_tokens=True))
    assert invoke("generate", out, "Once", "--new-tokens", "20")[:2] == (0, expected + "\n")
    _, printed, _ = invoke("generate", out, "Once", "--new-tokens", "20", "--json")
    assert json.loads(printed) == {"prompt": "Once", "answer": expected}
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Once")))
    assert invoke("generate", out, "-", "--new-tokens", "20")[1] == expected + "\n"


def test_what_generate_cannot_continue_is_refused(
    finished: tuple[Path, Path, str], invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _, _ = finished
    for arguments, code, message in (
        ((out, ""), 2, "prompt or stop string is empty"),
        ((out, "a" * 200), 2, "200 tokens: the export is made for at most 128"),
        ((out, "a", "--top-p", "0"), 2, "top_p 0.0: out of range"),
        ((out, "a", "--new-tokens", "0"), 2, "0 is not in the range"),
        ((out, "a\udcff"), 3, "invalid UTF-8"),
        ((out / "nowhere", "a"), 3, "not a bundle"),
    ):
        status, printed, errors = invoke("generate", *arguments)
        assert (status, printed.strip()) == (code, ""), arguments
        assert message in errors
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    status, _, errors = invoke("generate", out, "-")
    assert status == 3
    assert "invalid UTF-8 at byte 2" in errors


def test_generate_refuses_a_changed_model_unless_told_not_to_look(
    finished: tuple[Path, Path, str], invoke: Invoke, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(finished[0], tmp_path / "copy"))
    path = out / "onnx" / "model.onnx.data"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    status, _, errors = invoke("generate", out, "a")
    assert status == 7
    assert "model.onnx.data" in errors
    assert invoke("generate", out, "a", "--no-verify", "--new-tokens", "3")[0] == 0


def test_export_for_genai_adds_a_folder_and_keeps_the_graph(
    finished: tuple[Path, Path, str], invoke: Invoke, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(finished[0], tmp_path / "copy"))
    before = files(out / "onnx")
    code, printed, errors = invoke("export", out, "--target", "genai", "--json", "-q")
    assert code == 0, errors
    assert json.loads(printed)["logits_error"] < 1e-5
    assert files(out / "onnx") == before
    assert (out / "genai" / "genai_config.json").is_file()
    Bundle.open(out).verify("genai")
    code, _, errors = invoke("export", out, "--dtype", "fp16", "-q")
    assert code == 2
    assert "dtype was 'fp32' and is now 'fp16'" in errors
    code, _, errors = invoke("export", out, "--max-seq", "4000", "--overwrite", "-q")
    assert code == 2
    assert "--max-seq 4000: the model takes 1 to 128" in errors


def test_a_packed_model_is_smaller_and_is_taken_back_as_a_model(
    finished: tuple[Path, Path, str], invoke: Invoke, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(finished[0], tmp_path / "copy"))
    code, printed, errors = invoke("export", out, "--target", "packed", "--json", "-q")
    assert code == 0, errors
    sizes = json.loads(printed)
    assert sizes["packed"] == 14
    folder = out / "packed"
    assert sizes["bytes_after"] == (folder / "model.packed.safetensors").stat().st_size
    assert sizes["bytes_after"] < sizes["bytes_before"]
    dense = Dense(str(folder))
    before, after = (
        load_file(path / "model.safetensors") for path in (out / "model", dense.checkpoint().folder)
    )
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    # The report, made anew, has the sizes.
    (first,) = json.loads(finished[2])["models"]
    code, printed, errors = invoke("report", out, "--json")
    assert code == 0, errors
    (again,) = json.loads(printed)["models"]
    assert again["bytes"]["packed"]["pruned"] == sizes["bytes_after"]
    assert again["verdict"][-1].startswith("Packed, without its zeros, the checkpoint takes 0.")
    assert "packed" not in first["bytes"]


def test_only_n_of_m_can_be_packed(invoke: Invoke, tiny_llama: Path, tmp_path: Path) -> None:
    code, _, errors = invoke(
        "prune-export",
        tiny_llama,
        "-o",
        tmp_path / "out",
        "--pattern",
        "unstructured:0.5",
        "--target",
        "packed",
        "-q",
    )
    assert code == 2
    assert "needs an n:m pattern, and the pattern of this model is unstructured:0.5" in errors
    assert not (tmp_path / "out").exists()

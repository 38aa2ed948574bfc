"""Engines on the command line: export, verify, doctor, and what a machine without a GPU is told."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import Command
from tests.conftest import Invoke
from tests.test_cli import PRUNING, SMALL
from thanos_deploy.bundle import files
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.gpu import driver

ENGINE = "tensorrt-rtx-sm80"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.tensorrt,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt_rtx") is None,
        reason="tensorrt-rtx is not installed",
    ),
]


@pytest.fixture(scope="module")
def with_engine(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an engine, made by the real command. Not to be changed."""
    out = tmp_path_factory.mktemp("engine") / "out"
    pruning = PRUNING
    for arguments in (
        ["prune", tiny_llama, "-o", out, *pruning],
        ["export", out, "--target", "tensorrt-rtx", "--sm", "80", "--batch", "1,2", "--seq", "16"],
    ):
        command = Command(*arguments)
        _, errors = command.communicate()
        assert command.returncode == 0, errors.decode()
    return out


@pytest.fixture
def bundle(with_engine: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(with_engine, tmp_path / "moved"))


def test_an_engine_is_a_stage_beside_the_graph_that_it_is_made_from(with_engine: Path) -> None:
    opened = Bundle.open(with_engine)
    assert list(opened.stages) == ["prune", "onnx-fp16-last", ENGINE]
    result = opened.stages[ENGINE].result
    assert result["sparse_weights"]
    assert result["summary"]["pattern_holds"] == 14
    assert {Path(name).name for name in opened.stages[ENGINE].files} == {
        "model.engine",
        "build.json",
        "build.log",
        "timing.cache",
    }
    build = json.loads((with_engine / "engines" / ENGINE / "build.json").read_text())
    assert [way["batch"]["most"] for way in build["profiles"]] == [2, 2]


def test_a_second_engine_leaves_the_first_where_it_is(bundle: Path, invoke: Invoke) -> None:
    code, out, _ = invoke(
        "export", bundle, "--target", "tensorrt-rtx", "--sm", "89", "--seq", "16", "--json"
    )
    assert code == 0
    assert json.loads(out)["arch"] == ["sm89"]
    assert sorted(path.name for path in (bundle / "engines").iterdir()) == [
        "tensorrt-rtx-sm80",
        "tensorrt-rtx-sm89",
    ]
    Bundle.open(bundle).verify()


def test_a_repeated_export_builds_nothing(bundle: Path, invoke: Invoke) -> None:
    before = (bundle / "manifest.json").read_bytes()
    options = ("--target", "tensorrt-rtx", "--sm", "80", "--batch", "1,2", "--seq", "16")
    assert invoke("export", bundle, *options)[0] == 0
    assert (bundle / "manifest.json").read_bytes() == before
    code, _, err = invoke("export", bundle, *options[:-1], "32")
    assert code == 2
    assert "prompt was [16] and is now [32]" in err


def test_verify_says_what_is_proven_and_what_is_not(bundle: Path, invoke: Invoke) -> None:
    code, out, _ = invoke("verify", bundle, "--json")
    assert code == 0
    result = json.loads(out)
    seen = {check["name"]: (check["outcome"], check["detail"]) for check in result["checks"]}
    assert seen["prune: pattern"] == ("PASS", "14 of 14 layers hold 2:4")
    assert seen["onnx-fp16-last: pattern"] == ("PASS", "14 of 14 layers hold 2:4")
    assert seen[f"{ENGINE}: graph"] == ("PASS", "built from the current onnx-fp16-last/")
    # Built ahead of time: nobody knows the kernels yet, and nothing is claimed.
    assert seen[f"{ENGINE}: sparse kernels"][1].startswith("0 picked, 0 eligible, 14 hold 2:4")
    assert len(result["engines"][ENGINE]) == 14

    code, out, _ = invoke("verify", bundle, "--layers")
    assert code == 0
    assert "mlp.up_proj" in out.replace("\n", "")


def test_a_demand_for_sparse_kernels_is_a_gate(bundle: Path, invoke: Invoke) -> None:
    code, out, err = invoke("verify", bundle, "--require-sparse", "80%")
    assert code == 6
    assert "0 of 14 linear layers are proven" in err
    assert "FAIL" in out
    assert invoke("verify", bundle, "--require-sparse", "0")[0] == 0
    code, _, err = invoke("verify", bundle, "--require-sparse", "120%")
    assert code == 2
    assert "between 0 and 1" in err


@pytest.mark.parametrize("name", ["model.engine", "build.log", "build.json"])
def test_a_changed_engine_file_is_found(bundle: Path, name: str, invoke: Invoke) -> None:
    path = bundle / "engines" / ENGINE / name
    path.write_bytes(path.read_bytes() + b" ")
    code, _, err = invoke("verify", bundle)
    assert code == 7
    assert str(path) in err


def test_a_verdict_that_its_own_log_does_not_give_is_found(bundle: Path, invoke: Invoke) -> None:
    path = bundle / "engines" / ENGINE / "build.json"
    build = json.loads(path.read_text())
    for layer in build["layers"]:
        layer["verdict"] = "picked"
    build["summary"]["picked"] = 14
    files.write_json(path, build)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["stages"][ENGINE]["files"][f"engines/{ENGINE}/build.json"] = {
        "bytes": path.stat().st_size,
        "sha256": files.sha256(path),
    }
    files.write_json(bundle / "manifest.json", manifest)
    code, _, err = invoke("verify", bundle, "--require-sparse", "80%")
    assert code == 6
    assert "differ from those that follow from the engine's log and graph" in err


def test_an_engine_of_another_graph_is_found(bundle: Path, invoke: Invoke) -> None:
    options = ("--target", "onnx", "--dtype", "fp16")
    assert invoke("export", bundle, *options)[0] == 0  # a stage of its own: changes nothing
    assert invoke("verify", bundle)[0] == 0
    manifest = json.loads((bundle / "manifest.json").read_text())
    inputs = manifest["stages"][ENGINE]["inputs"]["onnx-fp16-last"]
    inputs["onnx-fp16-last/model.onnx"] = "0" * 64
    files.write_json(bundle / "manifest.json", manifest)
    code, _, err = invoke("verify", bundle)
    assert code == 6
    assert "built from an earlier onnx-fp16-last/" in err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--target", "tensorrt-rtx", "--sm", "90"), "sm90: the library builds for sm120"),
        (("--target", "tensorrt-rtx", "--sm", "ampere"), "list of positive integers"),
        (("--target", "tensorrt-rtx", "--dtype", "int8"), "takes fp16, fp32, int8-qdq"),
        (("--target", "onnx", "--dtype", "int8-qdq"), "onnx takes fp32, fp16, int8"),
        (("--target", "onnx", "--sm", "80"), "leave it out; onnx takes --dtype, --max-seq"),
        (("--target", "packed", "--dtype", "fp16"), "packed takes no options"),
        (("--target", "tensorrt-rtx", "--seq", "16,4096"), "a larger --max-seq"),
        (("--target", "tensorrt-rtx", "--batch", "0"), "list of positive integers"),
    ],
)
def test_engines_that_cannot_be_meant(
    bundle: Path, options: tuple[str, ...], complaint: str, invoke: Invoke
) -> None:
    code, _, err = invoke("export", bundle, *options)
    assert code == 2
    assert complaint in err


@pytest.mark.skipif(bool(driver.probe().gpus), reason="there is a GPU")
def test_without_a_gpu_everything_else_is_finished_and_the_next_command_named(
    tiny_llama: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ("prune-export", tiny_llama, *SMALL, "--target", "tensorrt", "-o", out)
    code, _, err = invoke(*arguments)
    assert code == 4
    assert "thanos-deploy export out --target tensorrt" in err
    assert err.startswith("Note: target tensorrt: not usable")  # before any work
    done = Bundle.open(out)
    assert {"prune", "eval", "onnx", "onnx-fp16-last", "bench", "report"} <= set(done.stages)
    done.verify()

    # The folder alone is enough to go on elsewhere: no dense model, no cache.
    moved = Path(shutil.move(out, tmp_path / "elsewhere"))
    monkeypatch.setenv("THANOS_DEPLOY_CACHE", str(tmp_path / "empty"))
    before = (moved / "manifest.json").read_bytes()
    code, _, err = invoke("export", moved, "--target", "tensorrt")
    assert code == 4
    assert "thanos-deploy export elsewhere --target tensorrt" in err
    assert (moved / "manifest.json").read_bytes() == before
    assert not (tmp_path / "empty").exists()
    code, _, err = invoke(
        "export", moved, "--target", "tensorrt-rtx", "--sparse-form", "auto", "--seq", "16"
    )
    assert code == 4
    assert "no GPU" in err


def test_the_one_liner_builds_an_engine_and_reports(
    tiny_llama: Path, tmp_path: Path, invoke: Invoke
) -> None:
    out = tmp_path / "out"
    code, _, err = invoke(
        "prune-export",
        tiny_llama,
        *SMALL,
        "-o",
        out,
        "--target",
        "tensorrt-rtx",
        "--sm",
        "80,89",
        "--sparse-form",
        "conv1x1",
    )
    assert code == 0, err
    opened = Bundle.open(out)
    result = opened.stages["tensorrt-rtx-sm80+sm89"].result
    assert result["sparse_form"] == "conv1x1"
    assert "report" in opened.stages
    assert invoke("verify", out)[0] == 0


def test_doctor_says_what_is_there_and_what_to_do(bundle: Path, invoke: Invoke) -> None:
    code, out, _ = invoke("doctor", "--json")
    assert code == 0
    found = {check["name"]: check for check in json.loads(out)["checks"]}
    assert found["ONNX Runtime"]["outcome"] == "PASS"
    assert found["target tensorrt-rtx"]["outcome"] == "PASS"
    if not driver.probe().gpus:
        assert found["GPU"]["outcome"] == "SKIP"
        assert "tensorrt-rtx builds without one" in found["GPU"]["fix"]
    code, out, _ = invoke("doctor", bundle)
    assert code == 3  # it has no graph of its own kind
    assert not out


def test_running_an_engine_without_a_gpu_is_refused(bundle: Path) -> None:
    if driver.probe().gpus:
        pytest.skip("there is a GPU")
    script = (
        "import sys\nfrom pathlib import Path\nfrom runtime.engine import open_engine\n"
        "open_engine(Path(sys.argv[1]), backend='tensorrt', provider='cuda')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(bundle)], capture_output=True, text=True, check=False
    )
    assert "PlatformError: no GPU" in done.stderr
